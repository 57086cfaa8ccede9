"""What two masks share if they agree on rows and columns only: a null that keeps both margins of every tensor.

The rows of a bottleneck's matrix are its units, the columns the hidden coordinates (or the other way round). Scores
that favour some of them concentrate masks there, and two masks that favour the same ones overlap without agreeing on
single weights.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit

TOLERANCE = 1e-9  # of a margin, as a share of the entries kept
STEPS = 100


def margin_chances(mask: np.ndarray) -> np.ndarray:
    """The probability that each entry is kept by the maximum-entropy mask with the row and column sums of `mask`.

    p_ij = 1/(1 + exp(−a_i − b_j)) with a and b such that Σ_j p_ij and Σ_i p_ij are the sums of `mask` (Jaynes 1957;
    for networks, Park and Newman 2004), by Newton's method. Rows and columns that are empty or full are 0 or 1, and so
    are those that become empty or full when these are set aside. A vector has one margin, its number of entries; in a
    tensor of more than two dimensions the first one counts as rows.
    """
    if mask.ndim < 2:
        return np.full(mask.shape, mask.mean())
    matrix = mask.reshape(len(mask), -1)
    chances = matrix.astype(float)
    rows, columns = _undecided(matrix)
    if rows.size and columns.size:
        free = np.ix_(rows, columns)
        tall = rows.size > columns.size  # the linear system is as large as the shorter side
        solved = _solved(chances[free].T if tall else chances[free])
        chances[free] = solved.T if tall else solved
    return chances.reshape(mask.shape)


def margin_moments(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the number of entries that two independent masks of one tensor share.

    `first` and `second` are the `margin_chances` p and q of both. Mean Σ p q. Variance
    Σ p(1 − p) q(1 − q) · r/(r − 1) · c/(c − 1) over the r rows and c columns that leave a choice: the sums are fixed,
    so if an entry is shared, others of its row and column are less likely to be. For a vector this is the variance of
    the hypergeometric distribution.
    """
    loose = first * (1 - first) * second * (1 - second)
    if loose.ndim < 2:
        sides = [int((loose > 0).sum())]
    else:
        loose = loose.reshape(len(loose), -1)
        sides = [int((loose > 0).any(axis=axis).sum()) for axis in (0, 1)]
    factor = np.prod([side / (side - 1) if side > 1 else 0.0 for side in sides])
    return float((first * second).sum()), float(loose.sum() * factor)


def _undecided(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns whose entries the margins do not determine."""
    rows, columns = (np.arange(side) for side in matrix.shape)
    while rows.size and columns.size:
        left = matrix[np.ix_(rows, columns)]
        by_row, by_column = left.mean(axis=1), left.mean(axis=0)
        open_rows, open_columns = (by_row > 0) & (by_row < 1), (by_column > 0) & (by_column < 1)
        if open_rows.all() and open_columns.all():
            break
        # one side at a time: an empty row must not make a column look full
        rows, columns = (rows[open_rows], columns) if not open_rows.all() else (rows, columns[open_columns])
    return rows, columns


def _solved(matrix: np.ndarray) -> np.ndarray:
    """The chances of a matrix with no more rows than columns, none of them empty or full."""
    row_sums, column_sums = matrix.sum(axis=1), matrix.sum(axis=0)
    half = logit(matrix.mean()) / 2
    rows, columns = logit(matrix.mean(axis=1)) - half, logit(matrix.mean(axis=0)) - half
    for _ in range(STEPS):
        chances = expit(rows[:, None] + columns)
        row_gap, column_gap = row_sums - chances.sum(axis=1), column_sums - chances.sum(axis=0)
        if max(np.abs(row_gap).max(), np.abs(column_gap).max()) <= TOLERANCE * row_sums.sum():
            break
        # Newton's step; columns are eliminated, and as a + t, b − t is the same for every t, one direction is fixed
        weight = chances * (1 - chances)
        share = weight / (down := weight.sum(axis=0))
        system = np.diag(across := weight.sum(axis=1)) - share @ weight.T
        step = np.linalg.solve(system + across.mean() / len(across), row_gap - share @ column_gap)
        other = (column_gap - weight.T @ step) / down
        shorten = min(1.0, 3.0 / max(np.abs(step).max(), np.abs(other).max()))
        rows, columns = rows + shorten * step, columns + shorten * other
    return chances
