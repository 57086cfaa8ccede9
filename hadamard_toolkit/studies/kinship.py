"""Clusters of tasks, and agreement of two similarity matrices (`similarity_matrix`)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy
from scipy.stats import rankdata

from hadamard_toolkit.errors import ArgumentError, check_choice, check_range

ALTERNATIVES = ("greater", "two-sided")
EXACT = 7  # up to so many tasks Mantel's test uses all permutations


def cluster_tasks(matrix: pd.DataFrame, *, method: str = "average") -> pd.DataFrame:
    """Hierarchical clustering of tasks by the distance 1 − similarity; the diagonal is not used.

    One row per merge, the closest first: `step`, `members` (the tasks of the new cluster, joined by " + "), `size`,
    `distance`. The order of the leaves is `.attrs["order"]`. Raises `ArgumentError` where a similarity is missing.
    """
    condensed = 1 - _upper(_checked(matrix, "matrix"))
    merges = hierarchy.linkage(condensed, method=method, optimal_ordering=True)
    names = list(map(str, matrix.index))
    clusters = [[name] for name in names]
    rows = []
    for step, (first, second, distance, size) in enumerate(merges):
        clusters.append(clusters[int(first)] + clusters[int(second)])
        members = " + ".join(sorted(clusters[-1]))
        rows.append({"step": step, "members": members, "size": int(size), "distance": distance})
    table = pd.DataFrame(rows)
    table.attrs["order"] = [names[leaf] for leaf in hierarchy.leaves_list(merges)]
    return table


def mantel(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    measure: str = "spearman",
    alternative: str = "greater",
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Mantel's test: do two similarity matrices over the same tasks order the pairs alike, more than by chance?

    The statistic is the correlation (`"spearman"` or `"pearson"`) of the entries above the diagonal. As pairs share
    tasks, the p-value comes from permuting the tasks of one matrix, rows and columns together (Mantel 1967): all n!
    permutations up to 7 tasks, else `permutations` drawn at random, with p = (1 + hits)/(1 + permutations). One row:
    value, p, `p_floor`, tasks, pairs, permutations, exact. `p_floor` is the least possible p: exchanging tasks that a
    matrix does not distinguish makes no difference. With "3 of 8 tasks are of one kind" as the second matrix it is
    3! 5!/8! = 1/56.

    The diagonal, each task's similarity with itself, must be constant. Otherwise some tasks are measured with more
    noise, which lowers all their similarities in both matrices, and so orders the pairs alike without any kinship. Use
    `similarity_matrix(…, value="disattenuated")` without the tasks that have none; a matrix without noise, such as a
    design, needs a constant diagonal.

    Generalises to: other ways of pairing the same tasks, not to other tasks.

    Simulated: 8 tasks without kinship, with reliabilities from 0.3 to 0.9: raw similarities are rejected in 0.97 of
    tables (and so refused), disattenuated ones in 0.05; a kinship that is a fifth of the variance is found in 0.97.
    `pytest tests/studies/test_kinship.py -k simulated`.
    """
    check_choice("measure", measure, ("spearman", "pearson"))
    check_choice("alternative", alternative, ALTERNATIVES)
    check_range("permutations", permutations, least=19)
    if set(first.index) != set(second.index) or len(first) < 4:
        raise ArgumentError(
            f"first and second must hold the same tasks, at least 4; they hold {list(first.index)} and "
            f"{list(second.index)}"
        )
    one = _checked(first, "first")
    other = _checked(second.loc[first.index, first.index], "second")
    for argument, matrix in (("first", one), ("second", other)):
        _check_diagonal(matrix, argument)
    count = len(one)
    exact = count <= EXACT
    if exact:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        generator = np.random.default_rng(seed)
        drawn = np.tile(np.arange(count), (permutations, 1))
        orders = np.vstack([np.arange(count), generator.permuted(drawn, axis=1)])
    rows, columns = np.triu_indices(count, 1)
    left, right = _upper(one)[None], other[orders[:, rows], orders[:, columns]]
    if measure == "spearman":
        left, right = rankdata(left, axis=1), rankdata(right, axis=1)
    left, right = (side - side.mean(1, keepdims=True) for side in (left, right))
    lengths = np.linalg.norm(left) * np.linalg.norm(right[:1])
    if not lengths > 0:
        raise ArgumentError("the entries of a matrix are all the same; there is nothing to correlate")
    values = (right @ left[0]) / lengths
    extreme = np.abs(values) if alternative == "two-sided" else values
    # the first permutation is the identity, so the count includes the observed value
    hits = int((extreme >= extreme[0] - 1e-12).sum())
    floor = max(1 / len(orders), *(_symmetries(side) / math.factorial(count) for side in (one, other)))
    result = {"value": values[0], "p": hits / len(orders), "p_floor": floor}
    sizes = {"tasks": count, "pairs": len(rows), "permutations": len(orders) - (not exact)}
    return pd.DataFrame([{**result, **sizes, "exact": exact}])


def _check_diagonal(matrix: np.ndarray, argument: str) -> None:
    diagonal = np.diag(matrix)
    if not np.allclose(diagonal, diagonal[0]):
        raise ArgumentError(
            f"{argument} has {diagonal.min():.2f} to {diagonal.max():.2f} on its diagonal: its tasks are measured with "
            "unequal noise, which orders their pairs as well. Use similarity_matrix(…, value='disattenuated') without "
            "the tasks that have none"
        )


def _symmetries(matrix: np.ndarray) -> int:
    """The number of permutations that only exchange tasks which the matrix does not distinguish."""
    count = len(matrix)
    classes: list[list[int]] = []
    for task in range(count):
        for alike in classes:
            others = [other for other in range(count) if other not in (task, alike[0])]
            if np.array_equal(matrix[task, others], matrix[alike[0], others]):
                alike.append(task)
                break
        else:
            classes.append([task])
    return math.prod(math.factorial(len(alike)) for alike in classes)


def _checked(matrix: pd.DataFrame, argument: str) -> np.ndarray:
    values = matrix.to_numpy(float)
    if matrix.shape[0] != matrix.shape[1] or list(matrix.index) != list(matrix.columns) or len(matrix) < 2:
        raise ArgumentError(
            f"{argument} is {matrix.shape}; a square table with the same tasks in rows and columns is needed"
        )
    upper = _upper(values)
    if not np.isfinite(upper).all() or not np.allclose(upper, _upper(values.T)):
        pairs = itertools.combinations(matrix.index, 2)
        missing = ", ".join(f"{a} and {b}" for a, b in pairs if not np.isfinite(matrix.loc[a, b])) or "none"
        raise ArgumentError(
            f"{argument} must be symmetric and complete off its diagonal; missing pairs: {missing}. Leave tasks out"
        )
    return values


def _upper(values: np.ndarray) -> np.ndarray:
    return values[np.triu_indices(len(values), 1)]
