"""The similarity study as tables to show: which runs compare, one cell of the long tables, tests of kinship."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.kinship import mantel
from hadamard_toolkit.studies.similarity import ALL_LAYERS, similarity_matrix
from hadamard_toolkit.studies.text import intervals

SAME = ["backbone", "adapter", "protocol"]  # what runs must share to differ in task and seed alone
CELL: dict[str, Any] = {"measure": "cosine", "removed": 0, "layer": ALL_LAYERS}
VECTORS = {"weight": "W − 1", "bias": "b"}


def comparable_runs(store: RunStore, *, method: str = "Hadamard") -> pd.DataFrame:
    """The runs of a method that differ in nothing but task and seed, of every task with two seeds or more.

    Rows of `store.load()`, the headline metric on test rows. Of several groups with the same backbone, adapter and
    protocol it is the one with most tasks. `DataError` where no task has two seeds.
    """
    runs = store.load()
    runs = runs[(runs["method"] == method) & runs["headline"] & (runs["split"] == "test")]
    runs = runs[runs.groupby([*SAME, "task"])["seed"].transform("nunique") >= 2]
    if runs.empty:
        raise DataError(
            f"no task of {store!r} has runs of {method} with two seeds; there is nothing to compare"
        )
    tasks = runs.groupby(SAME)["task"].transform("nunique")
    group = runs[tasks == tasks.max()][SAME].iloc[0]
    return runs[(runs[SAME] == group).all(axis=1)].reset_index(drop=True)


def one_cell(table: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """The rows of `vector_similarity`, `similarity_summary` or `similarity_contrast` of one measure.

    Without arguments the cosine of all coordinates, as the mean over layers. `measure`, `removed` and `layer` choose
    another cell; None leaves all: `one_cell(contrast, layer=None)` has every layer.
    """
    chosen = {name: value for name, value in {**CELL, **cell}.items() if value is not None}
    return table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)].reset_index(drop=True)


def contrast_table(contrast: pd.DataFrame, *, digits: int = 2) -> pd.DataFrame:
    """`similarity_contrast` over all layers as text: a row per vector, measure and number of coordinates removed.

    Columns: `floor`, `between`, `within`, `disattenuated`, each a mean with its interval.
    """
    rows = one_cell(contrast, measure=None, removed=None)
    rows = rows.assign(text=intervals(rows, "value", digits=digits))
    wide = rows.pivot(index=["vector", "measure", "removed"], columns="quantity", values="text")
    wide = wide[["floor", "between", "within", "disattenuated"]].rename(index=VECTORS)
    return wide.rename_axis(columns=None)


def kinship_tests(summary: pd.DataFrame, kind: Collection[str], **cell: Any) -> pd.DataFrame:
    """Mantel tests of one cell: do W − 1 and b order the pairs of tasks alike, and by whether both are of one kind?

    `kind` names the tasks of that kind. The similarities are disattenuated, and tasks that have none (no more alike to
    themselves than permuted coordinates are) are left out, as unequal noise is an order by itself; see `mantel`. The
    second question is asked only where some of the tasks that stay, but not all and not one, are of the kind.

    Columns: `first`, `second`, then `value` (ρ), `p`, `p_floor`, `tasks`, `pairs` of `mantel`. The tasks left out are
    in `.attrs["left_out"]`. Generalises to: other ways of pairing these tasks, not to other tasks.
    """
    chosen = {**CELL, **cell}
    matrices = {
        name: similarity_matrix(summary, vector=vector, value="disattenuated", **chosen)
        for vector, name in VECTORS.items()
    }
    known = pd.DataFrame({name: np.diag(matrix) for name, matrix in matrices.items()}).notna().all(axis=1)
    everybody = next(iter(matrices.values())).index
    tasks = everybody[known.to_numpy()]
    freed = {name: matrix.loc[tasks, tasks] for name, matrix in matrices.items()}
    alike = tasks.isin(list(kind))
    pairs = [("W − 1", "b", freed["b"])]
    if 1 < alike.sum() < len(tasks):
        design = pd.DataFrame(
            (np.outer(alike, alike) | np.eye(len(tasks), dtype=bool)).astype(float), tasks, tasks
        )
        pairs += [(name, "both of the kind", design) for name in freed]
    columns = ["value", "p", "p_floor", "tasks", "pairs"]
    rows = [
        {"first": name, "second": second, **mantel(freed[name], matrix).iloc[0][columns].to_dict()}
        for name, second, matrix in pairs
    ]
    table = pd.DataFrame(rows).astype({"tasks": int, "pairs": int})
    table.attrs["left_out"] = list(everybody.difference(tasks))
    return table


def seed_effect(pairs: pd.DataFrame) -> pd.DataFrame:
    """Similarity of runs of different tasks, by whether the two runs have the same seed: `mean`, `std`, `count`.

    `pairs` is one cell of `vector_similarity`. Rows: vector and `"same seed"` or `"other seed"`.
    """
    across = pairs[pairs["task_a"] != pairs["task_b"]]
    seeds = (across["seed_a"] == across["seed_b"]).map({True: "same seed", False: "other seed"})
    return across.groupby([across["vector"], seeds.rename("seeds")])["value"].agg(["mean", "std", "count"])
