"""The runs that count where several learning rates were tried, and whether the rate that was picked lies inside."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from hadamard_toolkit.runs.store import RunStore


def most_seeds(runs: pd.DataFrame, of: Sequence[str]) -> pd.DataFrame:
    """Of every group of `of`, the rows with the `protocol` that has most rows; `runs` has one row per run.

    A protocol whose rate was picked has all seeds, those that were only tried have one. Among equals the one with the
    best mean of `held_out` counts.
    """
    parts = [
        max(
            (rows for _, rows in part.groupby("protocol", sort=False)),
            key=lambda r: (len(r), r["held_out"].mean()),
        )
        for _, part in runs.groupby(list(of))
    ]
    return pd.concat(parts) if parts else runs


def picked_runs(store: RunStore) -> pd.DataFrame:
    """Runs at the picked rate, by `most_seeds` for each backbone, task, label, head policy and training rows.

    One row per run: the columns of `RunStore.load` that say what it is, `score` (headline, test rows), `held_out`
    (headline, validation rows), `n` (test rows), `rate`: the learning rate, and for `HeadOnly` that of the head.
    """
    runs = _runs(store)
    picked = most_seeds(runs, ["backbone", "task", "label", "train_rows", "head_policy"])
    return picked.sort_values(["task", "label", "seed"], ignore_index=True)


def picked_rates(store: RunStore) -> pd.DataFrame:
    """The picked rate of each task and method beside the rates that were tried: is it inside?

    `store` holds the runs of plans whose rates were picked task by task. Columns: `task`, `label`, `rate`, `lowest`,
    `highest`, `tried` (number of rates), `seeds`, `edge` (the picked rate is the lowest or the highest one).
    """
    runs, picked = _runs(store), picked_runs(store)
    by = ["task", "label"]
    table = picked.groupby(by).agg(rate=("rate", "first"), seeds=("seed", "nunique"))
    table = table.join(runs.groupby(by)["rate"].agg(lowest="min", highest="max", tried="nunique"))
    table["edge"] = (table["rate"] == table["lowest"]) | (table["rate"] == table["highest"])
    return table.reset_index()[[*by, "rate", "lowest", "highest", "tried", "seeds", "edge"]]


def _runs(store: RunStore) -> pd.DataFrame:
    """One row per run that has test rows: its identity, `score`, `held_out`, `n`, `rate`."""
    rows = store.load()
    rows = rows[rows["headline"]]
    held_out = rows[rows["split"] == "validation"].set_index("key")["value"].rename("held_out")
    runs = rows[rows["split"] == "test"].rename(columns={"value": "score"}).join(held_out, on="key")
    protocols = [json.loads(text) for text in runs["protocol"]]
    alone = runs["method"] == "HeadOnly"
    rates = [
        protocol["head_learning_rate" if head else "learning_rate"]
        for protocol, head in zip(protocols, alone, strict=True)
    ]
    return runs.assign(rate=rates)
