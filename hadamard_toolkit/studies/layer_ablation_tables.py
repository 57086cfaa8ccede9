"""Layer ablation of a store's runs as tables to show: what was measured, what it says, and how clearly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from hadamard_toolkit.errors import DataError, check_choice
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.layer_ablation import (
    HELD_OUT,
    ON_HELD_OUT_ROWS,
    TEST,
    layer_importance,
    read_kept,
)
from hadamard_toolkit.studies.statistics import mean_over
from hadamard_toolkit.studies.tables import mark_failed, measured_table, score_table, vector_table
from hadamard_toolkit.studies.text import short_names

ADAPTER = "Hadamard()"
SCORES = ("norm", *ON_HELD_OUT_ROWS)
SEVERAL = ", K = "  # between a task and its number of training rows, where a task has runs with several


def removal_table(store: RunStore, *, layers: int) -> pd.DataFrame:
    """Scores with some layers kept, of all runs of `Hadamard()` on a backbone of so many layers that have them.

    `measured_table(store, "removal")` with four more columns: `metric`, `train_rows`, what one answer for all rows
    scores (`constant`), and whether the run `failed` (`mark_failed`). Tasks have short names; a task whose runs were
    trained on different numbers of rows is one task per number, such as `"sst2, K = 100"`. `DataError` if there is no
    such run.
    """
    removals = short_names(measured_table(store, "removal"))
    scores = score_table(store)
    measured = scores[(scores["label"] == ADAPTER) & scores["key"].isin(removals["key"])]
    runs = mark_failed(measured, store).set_index("key")[["metric", "train_rows", "constant", "failed"]]
    table = removals.join(runs, on="key", how="inner")
    table = table[_size(table).groupby(table["key"]).transform("max") == layers].reset_index(drop=True)
    if table.empty:
        raise DataError(f"no run of {ADAPTER} on {layers} layers in {store!r} has scores with layers removed")
    several = table.groupby("task")["train_rows"].transform("nunique") > 1
    return table.assign(task=table["task"] + (SEVERAL + table["train_rows"].astype(str)).where(several, ""))


def removal_overview(removals: pd.DataFrame) -> pd.DataFrame:
    """What there is of each task and what there is to lose, one row per task.

    `removals` is a `removal_table`. Columns: `seeds`, `failed` (runs), `held_out` and `test` (rows of one run),
    `all_layers`, `no_layer` (mean test scores) and `worth`, their difference: what the layers are worth together.
    """
    size, task = _size(removals), removals["task"]
    test = removals["split"] == TEST
    by_run = removals.drop_duplicates("key").groupby("task")
    full = removals["score"][test & (size == size.max())].groupby(task).mean()
    none = removals["score"][test & (size == 0)].groupby(task).mean()
    return pd.DataFrame(
        {
            "seeds": by_run["seed"].nunique(),
            "failed": by_run["failed"].sum(),
            "held_out": removals["n"][removals["split"] == HELD_OUT].groupby(task).max(),
            "test": removals["n"][test].groupby(task).max(),
            **{"all_layers": full, "no_layer": none, "worth": full - none},
        }
    )


def of_runs(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` whose `key` is among those of `runs`, under the names that `runs` has for their tasks."""
    tasks = runs.drop_duplicates("key").set_index("key")["task"]
    rows = table[table["key"].isin(tasks.index)]
    return rows.assign(task=rows["key"].map(tasks)).reset_index(drop=True)


def layer_scores(store: RunStore, removals: pd.DataFrame, *, rules: Sequence[str] = SCORES) -> pd.DataFrame:
    """What can be known of a layer without removing it, for `removal_paths`: `key`, `task`, `layer`, `rule`, `value`.

    `"norm"` is how far its vectors moved (`layer_importance`, W and b together); `"taylor"` and `"fisher"` come from
    the gradients of held-out rows (`taylor_scores`). A rule that some run of `removals` has no scores of is left out.
    """
    for rule in rules:
        check_choice("rule", rule, SCORES)
    moved = layer_importance(of_runs(vector_table(store), removals))
    parts = [moved[moved["vector"] == "both"].rename(columns={"l2": "norm"})]
    if set(rules) & set(ON_HELD_OUT_ROWS):
        parts.append(of_runs(measured_table(store, "taylor"), removals))
    tables = [
        part.assign(rule=rule, value=part[rule])[["key", "task", "layer", "rule", "value"]]
        for part in parts
        for rule in SCORES
        if rule in part.columns and rule in rules and set(removals["key"]) <= set(part["key"])
    ]
    if not tables:
        raise DataError(f"no rule of {', '.join(rules)} has scores for every run of removals")
    return pd.concat(tables, ignore_index=True)


def rank_correlation(scores: pd.DataFrame, drops: pd.DataFrame) -> pd.DataFrame:
    """How well each cheap score ranks the layers by what removing them costs: Spearman's ρ, run by run.

    `scores` is `layer_scores`, `drops` is `leave_one_out`. Columns of `mean_over` by `rule`: the mean of ρ over tasks
    with its t interval for other tasks, and `n`, the tasks. A run in which all layers have one value has no ρ.
    """
    both = scores.merge(drops[["key", "layer", "drop"]], on=["key", "layer"])
    rows = [
        {"rule": rule, "task": task, "rho": run["value"].corr(run["drop"], method="spearman")}
        for (rule, task, _), run in both.groupby(["rule", "task", "key"], sort=False)
        if run["value"].nunique() > 1 and run["drop"].nunique() > 1
    ]
    return mean_over(pd.DataFrame(rows), "rho", by="rule")


def clearest_tests(chance: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """Of each question of `better_than_chance`, how many tests there were and the one with the smallest p.

    Columns: `question`, `tests`, `refused` (that could never be significant), `significant` (`p_holm` <= alpha), and of
    the test with the smallest `p_holm` (then `p`) `rule`, `size`, `gain`, `low`, `high`, `p`, `p_holm`; a question
    without a test that could be made has none of these.
    """
    rows: list[dict[Any, Any]] = []
    for question, part in chance.groupby("question", sort=False):
        made = part[part["refused"] == ""].sort_values(["p_holm", "p"], kind="stable")
        counts = {"tests": len(part), "refused": len(part) - len(made)}
        row: dict[Any, Any] = {
            "question": question,
            **counts,
            "significant": int((made["p_holm"] <= alpha).sum()),
        }
        if len(made):
            row |= made.iloc[0][["rule", "size", "gain", "low", "high", "p", "p_holm"]].to_dict()
        rows.append(row)
    return pd.DataFrame(rows)


def kept_and_removed(curves: pd.DataFrame, *, size: int, rule: str = "greedy") -> pd.DataFrame:
    """What a rule gave up on its way down to `size` layers: `task` and `seed` (the index), then by run `full`, `score`
    (of what was kept), `none` (no layer kept; NaN where that was not scored) and `removed`, the layers that went.

    `curves` is `removal_curves`.
    """
    check_choice("rule", rule, sorted(set(curves["rule"])))
    path = curves[curves["rule"] == rule]
    check_choice("size", size, sorted(set(path["size"])))
    everything = set(range(int(path["size"].max())))
    rows = path[path["size"] == size].set_index(["task", "seed"])
    removed = [", ".join(map(str, sorted(everything - set(read_kept(kept))))) for kept in rows["kept"]]
    none = path[path["size"] == 0].set_index(["task", "seed"])["score"]
    return rows[["full", "score"]].assign(none=none, removed=removed)


def retrained_subsets(retrained: pd.DataFrame, whole: pd.DataFrame, removals: pd.DataFrame) -> pd.DataFrame:
    """What training with some layers alone costs, beside removing the others from a trained adapter.

    `retrained` and `whole` are score tables: of runs of `Hadamard(layers=…)`, and of `Hadamard()` by the same protocol;
    `removals` is a `removal_table`. Runs pair up by task, seed and training rows. One row per retrained run: `task`,
    `seed`, `kept`, `retrained` and `after_the_fact`, both in differences of the test score to the adapter on all layers
    of the same seed, and `gap`, the first less the second. Empty where nothing pairs up.
    """
    on = ["task", "seed", "train_rows"]
    layers = retrained["label"].str.extract(r"layers=\((.*?),?\)")[0].str.replace(" ", "")
    runs = short_names(retrained).assign(kept=layers).dropna(subset="kept")
    full = short_names(whole[whole["label"] == ADAPTER]).set_index(on)["score"].rename("full")
    runs = runs.join(full, on=on).dropna(subset="full")
    test = removals[removals["split"] == TEST]
    test = test.assign(task=test["task"].str.split(SEVERAL).str[0], size=_size(test))
    of_all = test[test["size"] == test["size"].max()].set_index("key")["score"]
    fact = test.assign(after_the_fact=test["score"] - test["key"].map(of_all))
    both = runs.merge(fact[[*on, "kept", "after_the_fact"]], on=[*on, "kept"])
    both = both.assign(retrained=both["score"] - both["full"])
    both = both.assign(gap=both["retrained"] - both["after_the_fact"])
    return both[["task", "seed", "kept", "retrained", "after_the_fact", "gap"]]


def tasks_sharing_texts(tasks: Collection[str]) -> list[set[str]]:
    """SST-2 and the movies of the embedded suite, under whatever name: most sentences of SST-2's dev set are there."""
    return [{task for task in tasks if task.startswith(("sst2", "movies", "embedded/movies"))}]


def _size(removals: pd.DataFrame) -> pd.Series:
    return removals["kept"].map(lambda kept: len(read_kept(kept)))
