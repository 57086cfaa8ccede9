"""How many numbers does a task need? The share of a task's vectors that lies in directions found on other tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.hadamard import IDENTITY
from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_range
from hadamard_toolkit.studies.similarity import share_text
from hadamard_toolkit.studies.statistics import ALL_TASKS, t_interval

PARTS = ("weight", "bias")
RUN = ["task", "seed", "key"]
BASES = ("other tasks", "permuted", "random", "own seeds")


def task_basis(vectors: pd.DataFrame, task: str, *, parts: Sequence[str] = PARTS) -> np.ndarray:
    """Orthonormal principal directions [directions, coordinates] of the vectors of all tasks but `task`.

    `vectors` is `vector_table`. A run is the change W − 1 and b of all layers, as one vector; b is taken without its
    mean over coordinates, which the norm behind W_O subtracts. Seeds are averaged first, so that a task counts once.
    Directions are the right singular vectors of the task means, not centred, ordered by explained squared norm. Tasks
    that share texts with `task` (`share_text`) are left out. Raises `ArgumentError` if no other task is left.
    """
    changes = _changes(vectors, parts)
    check_choice("task", task, sorted(set(changes.index.get_level_values("task"))))
    return directions_of(means_of_others(changes, task).to_numpy())


def captured(vectors: pd.DataFrame, basis: np.ndarray, k: int, *, parts: Sequence[str] = PARTS) -> pd.Series:
    """The share of each run's squared norm in the first `k` directions of `basis` (index: task, seed, key).

    ‖B_k x‖² / ‖x‖² for the change x of a run and the orthonormal rows B_k; NaN for a run that did not move.
    """
    changes = _changes(vectors, parts)
    if basis.ndim != 2 or basis.shape[1] != changes.shape[1]:
        raise ArgumentError(
            f"basis has shape {basis.shape}; it must be [directions, {changes.shape[1]}] for these vectors and parts"
        )
    check_range("k", k, least=1, most=len(basis))
    return pd.Series(_shares(changes.to_numpy(), basis)[:, k - 1], index=changes.index, name="captured")


def basis_table(
    vectors: pd.DataFrame,
    *,
    parts: Sequence[str] = PARTS,
    draws: int = 20,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of a task's squared norm in k directions of other tasks, between chance and its own other seeds.

    `basis`: `"other tasks"` (`task_basis`, the task left out); two nulls with as many vectors of the same norms,
    averaged over `draws`: `"permuted"` (the coordinates of each layer permuted, W and b alike, another way for each
    task) and `"random"` (random directions); and `"own seeds"`, the runs of the same task with other seeds, as the
    ceiling. Shares are means over the runs of a task.

    One row per basis, k and task, and one for `"all tasks"`, the mean with its t interval. Columns: `basis`, `k`,
    `task`, `share`, `low`, `high`; `excess`, the share minus that of `"permuted"` for the same task and k, with
    `excess_low` and `excess_high`; `n` (tasks). Intervals are NaN for single tasks. Bases of one task's seeds end at
    k = seeds − 1.

    Generalises to: other tasks like these with the same number of tasks to find directions on. The bases of two tasks
    share all tasks but two, so their shares are not quite independent, and the interval is approximate.

    Simulated: with three planted directions the curve bends at k = 3; of independent vectors at most one of 16 studies
    claims an excess. `pytest tests/studies/test_basis.py -k "bends or independent"`
    """
    check_range("draws", draws, least=1)
    check_range("level", level, above=0, below=1)
    changes = _changes(vectors, parts)
    layers, width = (changes.columns.get_level_values(name).nunique() for name in ("layer", "coordinate"))
    generator = np.random.default_rng(seed)
    rows = []
    for task, runs in changes.groupby(level="task"):
        targets, others = runs.to_numpy(), means_of_others(changes, str(task)).to_numpy()
        means: dict[str, list[np.ndarray]] = {basis: [] for basis in BASES}
        means["other tasks"].append(_shares(targets, directions_of(others)).mean(axis=0))
        for _ in range(draws):
            for basis, drawn in (
                ("permuted", permuted_like(others, layers, width, generator)),
                ("random", random_like(others, generator)),
            ):
                means[basis].append(_shares(targets, directions_of(drawn)).mean(axis=0))
        if len(targets) > 1:
            by_run = [
                _shares(targets[[run]], directions_of(np.delete(targets, run, axis=0)))[0]
                for run in range(len(targets))
            ]
            means["own seeds"].append(np.mean(by_run, axis=0))
        for basis, shares in means.items():
            for place, share in enumerate(np.mean(shares, axis=0) if shares else ()):
                rows.append({"basis": basis, "k": place + 1, "task": task, "share": share})
    table = pd.DataFrame(rows)
    chance = table[table["basis"] == "permuted"].set_index(["task", "k"])["share"]
    of_row = pd.MultiIndex.from_frame(table[["task", "k"]])
    table["excess"] = table["share"].to_numpy() - chance.reindex(of_row).to_numpy()
    return _with_means(table, level)


def _with_means(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """The rows of single tasks, and one over all tasks per basis and k."""
    means = []
    for (basis, k), part in table.groupby(["basis", "k"], sort=False):
        row: dict[str, object] = {"basis": basis, "k": k, "task": ALL_TASKS, "n": len(part)}
        row["share"], row["low"], row["high"] = t_interval(part["share"].to_numpy(), level=level)
        excess = part["excess"].dropna().to_numpy()
        row["excess"], row["excess_low"], row["excess_high"] = t_interval(excess, level=level)
        means.append(row)
    columns = ["basis", "k", "task", "share", "low", "high", "excess", "excess_low", "excess_high", "n"]
    return pd.concat([table.assign(n=1), pd.DataFrame(means)], ignore_index=True)[columns]


def _changes(vectors: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    """W − 1 and b without its mean, one run per row, one (vector, layer, coordinate) per column."""
    if not parts:
        raise ArgumentError(f"parts={tuple(parts)!r} is not allowed; name at least one of {PARTS}")
    for part in parts:
        check_choice("parts", part, PARTS)
    chosen = vectors[vectors["vector"].isin(list(parts))]
    moved = chosen["value"] - chosen["vector"].map(IDENTITY)
    mean = moved.groupby([chosen["key"], chosen["layer"], chosen["vector"]]).transform("mean")
    moved = moved.where(chosen["vector"] != "bias", moved - mean)
    columns = ["vector", "layer", "coordinate"]
    wide = chosen.assign(value=moved).pivot(index=RUN, columns=columns, values="value").sort_index(axis=1)
    if wide.empty or wide.isna().any(axis=None):
        raise DataError(f"vectors must hold {' and '.join(parts)} of the same layers for every run")
    return wide


def means_of_others(changes: pd.DataFrame, task: str) -> pd.DataFrame:
    """Mean changes over seeds (index task) of the tasks that may describe `task`."""
    means = changes.groupby(level="task").mean()
    apart = [other != task and not share_text(str(other), task) for other in means.index]
    if not any(apart):
        raise ArgumentError(f"vectors holds no other task than {task!r} that shares no texts with it")
    return means[apart]


def directions_of(rows: np.ndarray) -> np.ndarray:
    """Orthonormal directions of `rows` [tasks, coordinates], by explained norm; fewer where rows are dependent."""
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(directions[lengths > 1e-10 * lengths[0]])


def _shares(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The share of the squared norm of each row in the first 1, 2, … directions: [rows, directions]."""
    squares = (rows**2).sum(axis=1, keepdims=True)
    along = np.cumsum((rows @ basis.T) ** 2, axis=1)
    return np.divide(along, squares, out=np.full(along.shape, np.nan), where=squares > 0)


def random_like(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Random directions with the norms of `rows`."""
    drawn = generator.normal(size=rows.shape)
    lengths = [np.linalg.norm(side, axis=1, keepdims=True) for side in (rows, drawn)]
    return np.asarray(drawn * lengths[0] / lengths[1])


def permuted_like(rows: np.ndarray, layers: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """`rows` with the coordinates of each layer permuted, all vectors of a layer alike, another way in every row."""
    cube = rows.reshape(len(rows), -1, layers, width)
    order = np.tile(np.arange(width), (len(rows), 1, layers, 1))
    return np.take_along_axis(cube, generator.permuted(order, axis=-1), axis=-1).reshape(rows.shape)
