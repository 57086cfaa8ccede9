"""Every method beside every other: what it trains and scores, with all labels, with few, and pruned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import pandas as pd

from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.mask_statistics import NO_CONTROL
from hadamard_toolkit.studies.tables import mark_failed, score_table
from hadamard_toolkit.studies.text import in_order, mean_sd_table

CONSTANT = "one answer for all"
FAMILIES = {
    "own weights": ("HeadOnly", "LayerNormTuning", "BitFit", "FullFineTuning"),
    "vectors": ("Hadamard", "IA3"),
    "low rank": ("LoRA",),
    "bottleneck": ("Houlsby", "Pfeiffer", "ParallelAdapter"),
    "prompts": ("PrefixTuning", "PromptTuning"),
    "combined": ("MAM", "UniPELT"),
}
METHODS = {method: family for family, methods in FAMILIES.items() for method in methods}


def method_scores(store: RunStore) -> pd.DataFrame:
    """Headline test scores with what each method trains, for `score_against_parameters`.

    Columns: `key`, `task`, `method`, `family` (of `FAMILIES`), `seed`, `parameters` (trained) and `stored`, both
    without the head, `score`, `n`, `train_rows`, and `constant` and `failed` of `mark_failed`. Sorted by task, method,
    family and seed; methods of no family are left out.
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == "test") & runs["method"].isin(METHODS)]
    runs = runs.rename(columns={"trained": "parameters", "value": "score"})
    runs = runs.assign(family=runs["method"].map(METHODS))
    columns = ["key", "task", "method", "family", "seed", "parameters", "stored", "score", "n", "train_rows"]
    return mark_failed(runs.sort_values(columns[1:5], ignore_index=True)[columns], store)


def score_grid(
    marked: pd.DataFrame, planned: Sequence[RunSpec], methods: Iterable[str] = METHODS, *, digits: int = 1
) -> pd.DataFrame:
    """Scores times 100 as text, methods by tasks: `"77.1 ± 0.4 (3) †1"` is mean ± sd (seeds), one of them failed.

    `marked` is a table of `mark_failed`; rows follow `methods`, columns the tasks of `planned`. A cell that a plan
    names and nobody ran says `"not run"`, one that no plan names has a dash. The first row is the score of one answer
    for all rows, the level of a model that learned nothing.
    """
    cells = mean_sd_table(
        in_order(marked, "method", methods), "method", "task", digits=digits, times=100, absent="–"
    )
    tasks = list(dict.fromkeys(spec.task for spec in planned))
    grid = cells.reindex(columns=tasks, fill_value="–").rename_axis(columns=None)
    for spec in planned:
        method = type(spec.adapter).__name__
        if method in grid.index and grid.loc[method, spec.task] == "–":
            grid.loc[method, spec.task] = "not run"
    constant = (100 * marked.groupby("task")["constant"].first()).map(f"{{:.{digits}f}}".format)
    first = pd.DataFrame([constant.reindex(tasks, fill_value="–")], index=[CONSTANT])
    return pd.concat([first, grid]).rename_axis("method")


def low_resource_table(
    store: RunStore, specs: Iterable[RunSpec], methods: Mapping[Adapter, str], *, task: str = "sst2"
) -> pd.DataFrame:
    """Scores against training rows, for `score_against_rows`: task, method, rows, seed, score, n, constant.

    Of the runs `specs` on `task` those of the adapters `methods`, under the names and in the order given there, but
    without runs whose head stayed random.
    """
    plan = {spec.key: spec for spec in specs}
    scores = score_table(store.only(list(plan.values()))).rename(columns={"train_rows": "rows"})
    scores = scores.assign(
        method=[methods.get(plan[key].adapter, "") for key in scores["key"]],
        head=[plan[key].protocol.head for key in scores["key"]],
    )
    scores = scores[(scores["task"] == task) & (scores["head"] != "frozen-random")]
    scores = mark_failed(in_order(scores, "method", methods.values()), store)
    return scores[["task", "method", "rows", "seed", "score", "n", "constant"]]


def sparse_methods(
    table: pd.DataFrame, sparsities: Collection[float], *, bottlenecks: Mapping[str, int]
) -> pd.DataFrame:
    """`sparse_table` with one adapter per method, named by it, at these sparsities and without controls.

    `bottlenecks` names the width that counts, method by method; methods that it does not name have one width.
    """
    parts = table["adapter"].str.extract(r"^(\w+)(?:\(bottleneck=(\d+))?")
    wanted = parts[0].map(bottlenecks)
    width = pd.to_numeric(parts[1])
    chosen = (table["control"] == NO_CONTROL) & table["sparsity"].isin(list(sparsities))
    return table.assign(adapter=parts[0])[chosen & (wanted.isna() | (width == wanted))]
