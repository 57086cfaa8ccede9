"""Tidy tables from a store: scores, training histories, learned vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.errors import DataError, check_choice, check_range
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.runs.record import KEPT, Run
from hadamard_toolkit.runs.spec import canonical_json
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.training import metrics


def score_table(store: RunStore, *, split: str = "test") -> pd.DataFrame:
    """Headline scores: key, task, method, label, seed, metric, score, n (rows scored), train_rows, subset.

    Sorted by task, method and seed. `score` is in natural units (accuracy 0..1, correlation -1..1).
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == split)].rename(columns={"value": "score"})
    columns = ["key", "task", "method", "label", "seed", "metric", "score", "n", "train_rows", "subset"]
    return runs.sort_values(["task", "method", "seed", "key"])[columns].reset_index(drop=True)


def named_scores(store: RunStore, methods: Mapping[str, Adapter], *, split: str = "test") -> pd.DataFrame:
    """Headline scores of the runs of these adapters under the names given, in the order given, then by task and rows.

    Columns: key, task, method (the name), seed, metric, score, n, rows (trained on), head (its policy), pretraining
    (what was read before, as in `RunStore.load`; `""` for nothing). Runs of other adapters are left out.
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == split)]
    names = {canonical_json(adapter_to_dict(adapter)): name for name, adapter in methods.items()}
    place = {name: number for number, name in enumerate(methods)}
    table = runs.assign(method=runs["adapter"].map(names), place=runs["adapter"].map(names).map(place))
    table = table.dropna(subset="place").sort_values(["place", "task", "train_rows", "seed", "key"])
    renamed = {"value": "score", "train_rows": "rows", "head_policy": "head"}
    columns = ["key", "task", "method", "seed", "metric", "score", "n", "rows", "head", "pretraining"]
    return table.rename(columns=renamed)[columns].reset_index(drop=True)


def constant_score(run: Run) -> float:
    """The headline metric of a run on its test rows for one constant answer: the level of no learning.

    The answer is the most frequent test label, or for regression the mean. NaN for span tasks.
    """
    test = run.predictions["test"]
    if "logits" not in test:
        return float("nan")
    labels, guess = test["labels"], np.zeros_like(test["logits"])
    if labels.dtype.kind == "f":
        guess[:] = labels.mean()
    else:
        guess[:, np.bincount(labels).argmax()] = 1
    return metrics.compute((run.headline,), guess, labels)[run.headline]


def mark_failed(scores: pd.DataFrame, store: RunStore, *, margin: float = 0.01) -> pd.DataFrame:
    """`scores` with two more columns: `constant`, the score of one answer for all rows, and whether the run `failed`.

    `scores` is `score_table(store)` or a part of it (`key`, `score`). A run has failed if its score is at most `margin`
    above the constant answer: it has learned nothing that its test rows show, and its score says nothing about the
    method. Report the share of failed runs, and every mean with them and without. `constant` is NaN, and `failed`
    False, for span tasks.
    """
    check_range("margin", margin, least=0)
    constant = [constant_score(store.run(key)) for key in scores["key"]]
    marked = scores.assign(constant=np.array(constant, dtype=float))
    return marked.assign(failed=marked["score"] <= marked["constant"] + margin)


def learned(marked: pd.DataFrame, *, control: str = "HeadOnly") -> pd.DataFrame:
    """The rows of the tasks in which something was learned: at most half of the runs with trained layers have failed.

    `marked` is a table of `mark_failed`. Runs of `control`, which trains no layer, do not count. A task that no method
    learns says nothing about methods, and draws every mean difference towards zero.
    """
    share = marked[marked["method"] != control].groupby("task")["failed"].mean()
    return marked[marked["task"].isin(share.index[share <= 0.5])]


def normalised_scores(marked: pd.DataFrame, ceiling: str = "FullFineTuning") -> pd.DataFrame:
    """Scores between the constant answer (0) and full fine-tuning (1), to compare tasks of different metrics.

    `marked` is a table of `mark_failed`; `ceiling` the method whose mean over seeds is 1. A task where that method has
    failed in every run, or was not run, has no such scale and is left out. Adds the column `normalised`.
    """
    check_choice("ceiling", ceiling, sorted(set(marked["method"])))
    best = marked[(marked["method"] == ceiling) & ~marked["failed"]]
    top = marked["task"].map(best.groupby("task")["score"].mean())
    gap = top - marked["constant"]
    return marked.assign(normalised=(marked["score"] - marked["constant"]) / gap)[gap.notna()]


def rates_tried(store: RunStore, *, split: str = "validation") -> pd.DataFrame:
    """The mean headline score of every method at every learning rate: method, rate, score, best, edge.

    `best` marks the rate with a method's highest score, and `edge` its lowest and highest rate: where the best one is
    at an edge, a wider search might have found a better one. The mean is over the tasks and seeds in the store.
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == split)]
    rates = [json.loads(text)["learning_rate"] for text in runs["protocol"]]
    means = runs.assign(rate=rates).groupby(["method", "rate"])["value"].mean()
    table = means.rename("score").reset_index()
    by_method = table.groupby("method")
    extremes = by_method["rate"].transform("min"), by_method["rate"].transform("max")
    table["best"] = table.index.isin(by_method["score"].idxmax())
    table["edge"] = (table["rate"] == extremes[0]) | (table["rate"] == extremes[1])
    return table


def history_table(store: RunStore) -> pd.DataFrame:
    """The training history of every run: key, task, method, seed, stage, epoch, split, metric, value.

    Two rows per epoch: `split` `"train"` with the metric `"loss"`, and `"validation"` with the headline metric.
    """
    parts = []
    for key in store.load()["key"].unique():
        run = store.run(key)
        method = type(run.spec.adapter).__name__
        fixed: dict[str, Any] = {"key": key, "task": run.spec.task, "method": method, "seed": run.spec.seed}
        place = run.history[["stage", "epoch"]].assign(**fixed)
        parts.append(place.assign(split="train", metric="loss", value=run.history["loss"]))
        if f"eval_{run.headline}" in run.history:
            value = run.history[f"eval_{run.headline}"]
            parts.append(place.assign(split="validation", metric=run.headline, value=value))
    columns = ["key", "task", "method", "seed", "stage", "epoch", "split", "metric", "value"]
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts, ignore_index=True)[columns]
    return table.sort_values(["task", "method", "seed", "stage", "epoch", "split"], ignore_index=True)


def vector_table(store: RunStore, *, site: str = "attention_output") -> pd.DataFrame:
    """Every learned coordinate at `site`: key, task, seed, layer, vector ("weight" or "bias"), coordinate, value.

    Runs without vectors at that site, or stored without weights, are left out; `DataError` if none has any.
    """
    parts = []
    for key in store.load()["key"].unique():
        run = store.run(key)
        if run.info["run_info"]["weights"] != KEPT:
            continue
        vectors = store.vectors(key)
        for vector in ("weight", "bias"):
            if (values := vectors.get(f"{site}.{vector}")) is None:
                continue
            layer, coordinate = (axis.ravel() for axis in np.indices(values.shape))
            fixed: dict[str, Any] = {
                "key": key,
                "task": run.spec.task,
                "seed": run.spec.seed,
                "vector": vector,
            }
            columns = {"layer": layer, "coordinate": coordinate, "value": values.ravel()}
            parts.append(pd.DataFrame(columns).assign(**fixed).dropna())
    if not parts:
        raise DataError(f"no run of {store!r} has vectors at site={site!r}")
    order = ["key", "task", "seed", "layer", "vector", "coordinate", "value"]
    table = pd.concat(parts, ignore_index=True)[order]
    return table.sort_values(order[1:-1], ignore_index=True)


def sparse_table(store: RunStore, *, split: str = "test") -> pd.DataFrame:
    """Headline scores of pruned runs and their controls, one row per run, for `plotting.score_against_sparsity`.

    Columns: key, adapter (as code), task, scorer, sparsity (share removed), control, seed, score, nonzero (adapter
    parameters that are not zero), n, train_rows. A run without pruning has sparsity 0 if another run prunes its
    adapter. Otherwise it is the control `"dense"` of the widest adapter of its method that the store has both pruned
    and dense, at the sparsity that leaves as many parameters of that one; it is left out if there is no such adapter.
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == split)].reset_index(drop=True)
    pruning = [json.loads(text) or {} for text in runs["sparsity"]]
    table = pd.DataFrame(
        {
            "key": runs["key"],
            "adapter": [_adapter(text) for text in runs["adapter"]],
            "task": runs["task"],
            "scorer": [sparsity.get("scorer", "dense") for sparsity in pruning],
            "sparsity": [float(sparsity.get("sparsity", 0.0)) for sparsity in pruning],
            "control": [sparsity.get("control") or "none" for sparsity in pruning],
            "seed": runs["seed"],
            "score": runs["value"],
            "nonzero": runs["nonzero_adapter"],
            "n": runs["n"],
            "train_rows": runs["train_rows"],
        }
    )
    pruned = table["scorer"] != "dense"
    for _, rows in table.groupby(runs["method"]):
        unpruned = rows[~pruned[rows.index]]
        both = unpruned["adapter"].isin(rows.loc[pruned[rows.index], "adapter"])
        widest = unpruned[both].nlargest(1, "nonzero")
        for row in unpruned.index[~both]:
            if widest.empty:
                table = table.drop(index=row)
            else:
                table.loc[row, "control"] = "dense"
                table.loc[row, "adapter"] = widest["adapter"].iloc[0]
                table.loc[row, "sparsity"] = 1 - table.loc[row, "nonzero"] / widest["nonzero"].iloc[0]
    order = ["adapter", "task", "control", "scorer", "sparsity", "seed"]
    return table.sort_values(order, ignore_index=True)


def measured_table(store: RunStore, name: str) -> pd.DataFrame:
    """The stored table `name` of every run that has it, with the run's key, task, method and seed in front.

    Nothing is measured here (see `measurements.measure`). `DataError` if no run has such a table.
    """
    runs = store.load().drop_duplicates("key").sort_values(["task", "method", "seed", "key"])
    parts = []
    front = ["key", "task", "method", "seed"]
    for values in runs[front].itertuples(index=False, name=None):
        if store.has(values[0], f"measured/{name}.json"):
            measured = store.measured(values[0], name, pd.DataFrame)
            rest = [column for column in measured.columns if column not in front]
            fixed: dict[str, Any] = dict(zip(front, values, strict=True))
            parts.append(measured.assign(**fixed)[[*front, *rest]])
    if not parts:
        raise DataError(f"{name!r} was not measured on any run of {store!r}")
    return pd.concat(parts, ignore_index=True)


def _adapter(text: str) -> str:
    return label_of(adapter_from_dict(json.loads(text)))
