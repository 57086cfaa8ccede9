"""Cross-task transfer: what the vectors of one task bring in the model of another, as tables."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.statistics import mean_over
from hadamard_toolkit.studies.tables import measured_table
from hadamard_toolkit.studies.text import short_names

WHOSE = ("own", "the same kind", "another kind", "permuted")


def transfer_table(store: RunStore, keys: Collection[str]) -> pd.DataFrame:
    """What `measurements.cross_task_transfer` measured on the runs `keys`, under short names, with the `gain`.

    `gain` is the score above that of the bare backbone (`kind` `"none"`) of the same run with the same kind of head;
    `source` names the task whose vectors they are. Rows with the target's own norms in place of the source's are left
    out. `DataError` where none of the runs was measured.
    """
    table = short_names(measured_table(store, "transplant")).rename(columns={"source_task": "source"})
    table = table[table["key"].isin(list(keys)) & (table["norms"] != "target")]
    if table.empty:
        raise DataError(
            f"none of the {len(keys)} runs of {store!r} was measured with the vectors of other tasks"
        )
    bare = table[table["kind"] == "none"].set_index(["key", "head"])["score"].rename("bare")
    table = table.join(bare, on=["key", "head"])
    return table.assign(gain=table["score"] - table["bare"]).drop(columns="bare").reset_index(drop=True)


def transfer_gains(table: pd.DataFrame, kind: Collection[str], *, head: str = "retrained") -> pd.DataFrame:
    """Mean gain of the tasks `kind`, by whose vectors they were given: means over targets, with t intervals.

    `table` is `transfer_table`. `vectors` is `"own"`, `"the same kind"` (another task of `kind`), `"another kind"`, or
    `"permuted"` (coordinates of each layer, of any other task). Metrics are kept apart, as they have no common unit.

    Columns: `vectors`, `metric`, `mean`, `low`, `high` (NaN for one target), `n` (targets), `averaged` (models).
    Generalises to: other tasks of the kind; not to other seeds where each target has one.
    """
    rows = table[(table["head"] == head) & table["task"].isin(list(kind)) & (table["kind"] != "none")]
    kin = rows["source"].isin(list(kind))
    cases = [rows["kind"] == "own", rows["kind"] == "permuted", kin]
    whose = np.select(cases, ["own", "permuted", "the same kind"], "another kind")
    rows = rows.assign(vectors=pd.Categorical(whose, WHOSE, ordered=True)).sort_values(
        ["vectors", "metric"], kind="stable"
    )
    means = mean_over(rows.astype({"vectors": str}), "gain", by=["vectors", "metric"])
    return means[["vectors", "metric", "mean", "low", "high", "n", "averaged"]]
