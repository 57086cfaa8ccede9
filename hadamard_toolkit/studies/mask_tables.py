"""The mask study as tables to show: which masks there are, where they fall, and what they share."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies.mask_statistics import NO_CONTROL, MaskRun, dead_units, density_table
from hadamard_toolkit.studies.text import short_names

INIT = {True: "same init", False: "other init"}
TASK = {True: "same task", False: "other task"}
NO_PAIRS = "no pairs"
ABOVE = {"densities": "above", "margins": "margin_above"}


def mask_overview(runs: list[MaskRun]) -> pd.DataFrame:
    """How many seeds have a mask, without controls: a row per adapter, task and scorer, a column per sparsity."""
    facts = pd.DataFrame([run.facts for run in runs if run.control == NO_CONTROL])
    seeds = facts.groupby(["adapter", "task", "scorer", "sparsity"])["init_seed"].nunique()
    return short_names(seeds.unstack("sparsity", fill_value=0).rename(columns="{:.0%} removed".format))


def masks_at(runs: list[MaskRun], sparsity: float) -> list[MaskRun]:
    """The masks that compare: those without controls at `sparsity`, of the adapter that has most of them."""
    there = [run for run in runs if run.sparsity == sparsity and run.control == NO_CONTROL]
    if not there:
        raise DataError(f"no mask at sparsity={sparsity}; there are {sorted({run.sparsity for run in runs})}")
    [(adapter, _)] = Counter(run.adapter for run in there).most_common(1)
    return [run for run in there if run.adapter == adapter]


def of_own_seed(runs: list[MaskRun]) -> list[MaskRun]:
    """One mask per scorer, task and seed: without those that were scored on another draw of examples."""
    return [run for run in runs if run.data_seed in (None, run.init_seed)]


def densities(runs: list[MaskRun]) -> pd.DataFrame:
    """`density_table` by layer for `plotting.density_by_layer`, one panel per task: that is its `adapter`."""
    table = density_table(runs).rename(columns={"init_seed": "seed"})
    return table.assign(adapter=short_names(table)["task"])


def kept_by_side(runs: list[MaskRun]) -> pd.DataFrame:
    """Share kept of each matrix of the bottleneck (`down`, `up`; of LoRA `A`, `B`), scorer by scorer."""
    table = density_table(runs, by="tensor")
    side = table["tensor"].str.removesuffix(".weight").str.rsplit(".", n=1).str[-1].rename("side")
    counts = table.groupby([table["scorer"], side])[["kept", "entries"]].sum()
    return (counts["kept"] / counts["entries"]).unstack("side")


def overlap_grid(cells: pd.DataFrame, value: str = "corrected") -> pd.DataFrame:
    """One column of `overlap_cells` as text: a row per scorer, the four cells across, pairs in brackets.

    A cell without pairs says so. `value` is `"corrected"`, `"margin_corrected"` or `"naive"`.
    """
    named = cells.assign(
        text=[
            f"{mean:+.3f} ({pairs})" if pairs else NO_PAIRS
            for mean, pairs in cells[[value, "pairs"]].itertuples(index=False)
        ],
        init=cells["same_init"].map(INIT),
        task=cells["same_task"].map(TASK),
    )
    grid = named.pivot(index="scorer", columns=["init", "task"], values="text")
    columns = [(init, task) for init in INIT.values() for task in TASK.values()]
    return grid.reindex(columns=pd.MultiIndex.from_tuples(columns, names=["init", "task"]))


def alike_beyond(cells: pd.DataFrame) -> dict[str, float]:
    """Pairs of masks from different initialisations that overlap more than 97.5 % of chance draws, over all cells.

    Returns `pairs`, and the shares of them that are alike beyond the densities of tensors (`densities`) and beyond
    their rows and columns as well (`margins`). By chance each would be 0.025.
    """
    far = cells[~cells["same_init"] & (cells["pairs"] > 0)]
    pairs = int(far["pairs"].sum())
    shares = {name: (far[column] * far["pairs"]).sum() / pairs for name, column in ABOVE.items()}
    return {"pairs": pairs, **shares}


def dead_by_scorer(runs: list[MaskRun]) -> pd.DataFrame:
    """`dead_units` by scorer: `units` of an adapter, mean number `dead` and `expected` by chance, over runs.

    `above` is the share of bottlenecks with more dead units than the 95 % interval of chance.
    """
    dead = dead_units(runs)
    by_run = dead.groupby(["scorer", "key"])[["units", "dead", "expected"]].sum()
    above = (dead["dead"] > dead["high"]).groupby(dead["scorer"]).mean()
    return by_run.groupby("scorer").mean().assign(above=above)
