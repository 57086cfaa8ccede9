"""Tidy tables from a store: scores, training histories, learned vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore


def score_table(store: RunStore, *, split: str = "test") -> pd.DataFrame:
    """Headline scores: key, task, method, label, seed, metric, score, n (rows scored), train_rows, subset.

    Sorted by task, method and seed. `score` is in natural units (accuracy 0..1, correlation -1..1).
    """
    runs = store.load()
    runs = runs[runs["headline"] & (runs["split"] == split)].rename(columns={"value": "score"})
    columns = ["key", "task", "method", "label", "seed", "metric", "score", "n", "train_rows", "subset"]
    return runs.sort_values(["task", "method", "seed", "key"])[columns].reset_index(drop=True)


def history_table(store: RunStore) -> pd.DataFrame:
    """The course of every run: key, task, method, seed, stage, epoch, split, metric, value; one row per epoch.

    `split` is `"validation"` with the headline metric, and `"train"` with the metric `"loss"`.
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
        if run.info["run_info"]["weights"] != "kept":
            continue
        spec = run.spec
        for name, values in store.vectors(key).items():
            place, _, vector = name.partition(".")
            if place != site or vector not in ("weight", "bias"):
                continue
            layer, coordinate = (axis.ravel() for axis in np.indices(values.shape))
            fixed: dict[str, Any] = {"key": key, "task": spec.task, "seed": spec.seed, "vector": vector}
            columns = {"layer": layer, "coordinate": coordinate, "value": values.ravel()}
            parts.append(pd.DataFrame(columns).assign(**fixed).dropna())
    if not parts:
        raise DataError(f"no run of {store!r} has vectors at site={site!r}")
    order = ["key", "task", "seed", "layer", "vector", "coordinate", "value"]
    table = pd.concat(parts, ignore_index=True)[order]
    return table.sort_values(order[1:-1], ignore_index=True)
