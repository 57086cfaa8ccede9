"""The {W, b, norm} grid of the Hadamard adapter: what does each of its parts add to the score?"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.studies.statistics import one_kind, t_interval
from hadamard_toolkit.studies.text import intervals

PARTS = ("weight", "bias", "norm")
SYMBOLS = {"weight": "W", "bias": "b", "norm": "norm"}
CELLS = tuple(
    sorted(
        itertools.product((False, True), repeat=len(PARTS)),
        key=lambda cell: (sum(cell), [not c for c in cell]),
    )
)


def cell_of(adapter: str) -> tuple[bool, bool, bool] | None:
    """Whether W, b and the attention norm train, from the JSON text of an adapter; None for one outside the grid.

    The grid: `HeadOnly()`, `LayerNormTuning()`, and `Hadamard` at its default placement on all layers with any of W
    and b, and the attention norm or none.
    """
    record = json.loads(adapter)
    name = record.pop("adapter")
    if name == "HeadOnly":
        return False, False, False
    if name == "LayerNormTuning" and record == {"norm": "attention", "layers": "all"}:
        return False, False, True
    if name != "Hadamard" or record["norm"] not in (None, "attention"):
        return None
    if record["layers"] != "all" or record["placement"] != "attention_output":
        return None
    return "weight" in record["vectors"], "bias" in record["vectors"], record["norm"] == "attention"


def cell_name(weight: bool, bias: bool, norm: bool) -> str:
    """What trains, in symbols: `"W + b + norm"`, or `"nothing"`."""
    parts = [SYMBOLS[part] for part, there in zip(PARTS, (weight, bias, norm), strict=True) if there]
    return " + ".join(parts) or "nothing"


def ablation_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the grid: key, task, seed, weight, bias, norm (bool), cell, score, gain, parameters, n.

    `runs` is `RunStore.load()` of one plan (`store.only(…)`). `gain` is the score above that of the cell "nothing" of
    the same task and seed, NaN where it was not run. Raises `ArgumentError` for more than one run of a task, seed and
    cell, and for more than one protocol within a task.
    """
    columns = ["key", "task", "seed", *PARTS, "cell", "score", "gain", "parameters", "n"]
    tests = runs[runs["headline"] & (runs["split"] == "test") & (runs["sparsity"] == "null")]
    table = tests.assign(cell=tests["adapter"].map(cell_of)).dropna(subset="cell")
    if table.empty:
        return pd.DataFrame(columns=columns)
    table = table.rename(columns={"value": "score", "trained": "parameters"})
    table[list(PARTS)] = table["cell"].tolist()
    table["cell"] = [cell_name(*cell) for cell in table["cell"]]
    if (table.groupby("task")["protocol"].nunique() > 1).any() or table.duplicated(
        ["task", "seed", "cell"]
    ).any():
        raise ArgumentError(
            "runs mixes protocols of one task, or has a cell twice; give those of one plan: store.only(PLAN).load()"
        )
    floor = table[table["cell"] == cell_name(False, False, False)].set_index(["task", "seed"])["score"]
    of_run = pd.MultiIndex.from_frame(table[["task", "seed"]])
    table["gain"] = table["score"].to_numpy() - floor.reindex(of_run).to_numpy()
    order = {cell_name(*cell): rank for rank, cell in enumerate(CELLS)}
    table = table.sort_values(["task", "cell", "seed"], key=lambda c: c.map(order) if c.name == "cell" else c)
    return table[columns].reset_index(drop=True)


def component_effects(table: pd.DataFrame, *, over: str = "seed", level: float = 0.95) -> pd.DataFrame:
    """What each part adds to the score, with and without the others: paired differences of runs by task and seed.

    `table` is that of `ablation_table`. For every part and each state of the two others, d = score with - score
    without, one number per task and seed in which both were run. Rows: `part`, `beside` (what else trains;
    `"average"` is the main effect: the mean over the four states, of tasks and seeds that have all eight cells; last,
    `"W + b"` beside `"norm"` compares the adapter with the norm alone, its control), `effect` (the mean over tasks of
    the mean over seeds), `sd` (of seeds within tasks, pooled), `low`, `high`, `over`, `tasks`, `runs`.

    Generalises to: with `over="seed"`, other seeds of these tasks (a t interval from the spread of seeds within tasks;
    NaN for one seed per task). With `over="task"`, other tasks like these (a t interval over tasks; NaN for one task):
    much wider where tasks differ, and the one to quote for "the part helps".

    Simulated: 3 tasks x 3 seeds, tasks as different as seeds. `over="seed"` covers the effect on these tasks in 0.95 of
    studies and that on other tasks in 0.74; `over="task"` covers the latter in 0.95.
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k component`
    """
    check_choice("over", over, ("seed", "task"))
    one_kind(table)
    wide = table.pivot(index=["task", "seed"], columns="cell", values="score")
    rows = []

    def add(part: str, beside: str, differences: pd.Series) -> None:
        rows.append({"part": part, "beside": beside, **_effect(differences.dropna(), over, level)})

    for position, part in enumerate(PARTS):
        states = []
        for others in itertools.product((False, True), repeat=len(PARTS) - 1):
            cells = [[*others[:position], on, *others[position:]] for on in (True, False)]
            names = [cell_name(*cell) for cell in cells]
            if set(names) <= set(wide.columns):
                states.append(wide[names[0]] - wide[names[1]])
                add(SYMBOLS[part], names[1], states[-1])
        if len(states) == 2 ** (len(PARTS) - 1):
            add(SYMBOLS[part], "average", pd.concat(states, axis=1).dropna().mean(axis=1))
    everything, control = cell_name(True, True, True), cell_name(False, False, True)
    if {everything, control} <= set(wide.columns):
        add(cell_name(True, True, False), control, wide[everything] - wide[control])
    columns = ["part", "beside", "effect", "sd", "low", "high", "over", "tasks", "runs"]
    return pd.DataFrame(rows, columns=columns)


def effects_text(table: pd.DataFrame) -> pd.DataFrame:
    """`component_effects` to show, in points with both intervals: for `other seeds` of these tasks and `other tasks`.

    Index `part` and `beside`; columns also `tasks` and `runs` (pairs).
    """
    seeds, tasks = (component_effects(table, over=over) for over in ("seed", "task"))
    texts = {
        "other seeds": intervals(seeds, "effect", times=100),
        "other tasks": intervals(tasks, "effect", times=100),
    }
    return seeds.assign(**texts).set_index(["part", "beside"])[["tasks", "runs", *texts]]


def _effect(differences: pd.Series, over: str, level: float) -> dict[str, Any]:
    """Mean over tasks, with the interval over tasks or that of the pooled spread of seeds within tasks."""
    groups = differences.groupby("task")
    counts, tasks = groups.size().to_numpy(), groups.ngroups
    effect, low, high = t_interval(groups.mean().to_numpy(), level=level)
    freedom = int(counts.sum()) - tasks
    within = (differences - groups.transform("mean")).to_numpy()
    sd = math.sqrt(float((within**2).sum()) / freedom) if freedom >= 1 else math.nan
    if over == "seed":
        low = high = math.nan
        if freedom >= 1:
            error = sd * math.sqrt(float(np.sum(1 / counts))) / tasks
            reach = stats.t.ppf((1 + level) / 2, freedom) * error
            low, high = effect - reach, effect + reach
    sizes = {"over": over, "tasks": tasks, "runs": int(counts.sum())}
    return {"effect": effect, "sd": sd, "low": low, "high": high, **sizes}
