"""The order in which the runs of other tasks let their layers go."""

from __future__ import annotations

from collections.abc import Collection

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore


def consensus_order(store: RunStore, tasks: Collection[str], layers: Collection[int]) -> tuple[int, ...]:
    """Layers, first to go first, by the mean rank over the tasks of `store` that are not among `tasks`.

    Ranks are those of greedy elimination on held-out rows (`studies.layers`), averaged over the runs of a task, then
    over tasks; of equals the lower layer goes first. `DataError` where nothing was measured on other tasks.
    """
    from hadamard_toolkit.studies.layers import greedy_elimination
    from hadamard_toolkit.studies.tables import measured_table

    table = measured_table(store, "removal")
    others = table[~table["task"].isin(list(tasks))]
    size = others["kept"].map(lambda kept: kept.count(",") + 1 if kept else 0)
    others = others[size.groupby(others["key"]).transform("max") == len(layers)]
    if others.empty:
        raise DataError(
            f"no run of another task with {len(layers)} layers was measured in {store.folder}; "
            "`hadamard measure` does it"
        )
    steps = greedy_elimination(others)
    steps = steps[steps["removed"] >= 0]
    # the size that is left when a layer goes: the larger, the earlier
    left = steps.groupby(["task", "removed"])["size"].mean().groupby("removed").mean()
    return tuple(int(layer) for layer in left.sort_values(ascending=False, kind="stable").index)
