"""Orders in which to remove layers: by the runs of other tasks, or by backward elimination on this one."""

from __future__ import annotations

from collections.abc import Collection, Generator

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets.evaluation import Evaluation


def consensus_order(store: RunStore, tasks: Collection[str], layers: Collection[int]) -> tuple[int, ...]:
    """Layers in order of removal, by their mean rank over the tasks of `store` that are not among `tasks`.

    Ranks are those of greedy elimination on held-out rows (`studies.layers`), averaged over the runs of a task, then
    over tasks; of equal layers the lower one goes first. `DataError` where nothing was measured on other tasks.
    """
    from hadamard_toolkit.studies.layer_ablation import greedy_elimination
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
    # how many layers were left when each one was removed: the more, the earlier
    left = steps.groupby(["task", "removed"])["size"].mean().groupby("removed").mean()
    return tuple(int(layer) for layer in left.sort_values(ascending=False, kind="stable").index)


def greedy_order(evaluation: Evaluation) -> Generator[tuple[str, float], None, tuple[int, ...]]:
    """The order in which `evaluation.greedy` removes layers; yields a description and the share done."""
    layers = {layer for layer, _ in evaluation.places}
    removals, order = evaluation.greedy(), list[int]()
    while left := layers - set(order):
        for layer in left:  # the scores that `removals` needs next, one batch per step
            for _ in evaluation.steps(left - {layer}):
                yield f"greedy elimination on {evaluation.name}", len(order) / len(layers)
        order.append(next(removals))
    return tuple(order)
