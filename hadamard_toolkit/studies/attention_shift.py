"""What training does to the outputs of self-attention: norms, geometry, and the function from old to new.

The first two empirical studies of Chen et al. (2023), which motivate the Hadamard adapter, here with the same inputs
before and after, without padding, with intervals over examples and seeds, a debiased similarity with its ceiling, and
fits that are compared on held-out examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from hadamard_toolkit.errors import ArgumentError, DataError, check_range
from hadamard_toolkit.studies.frames import require_columns
from hadamard_toolkit.studies.statistics import hierarchical_bootstrap

DEGREES = {"linear": 1, "quadratic": 2, "cubic": 3}
FITS = ("unchanged", *DEGREES)
GROUP = ["task", "method", "layer"]


def norms_by_example(outputs: ArrayLike, example: ArrayLike) -> np.ndarray:
    """Mean Euclidean norm of the rows of `outputs` [tokens, width] by their `example` [tokens], numbered from 0.

    Padding tokens must be left out.
    """
    rows, group = _tokens(outputs, example)
    return np.bincount(group, np.linalg.norm(rows, axis=1)) / np.bincount(group)


def means_by_example(outputs: ArrayLike, example: ArrayLike) -> np.ndarray:
    """Mean row of `outputs` [tokens, width] by example: [examples, width].

    Similarity measures need independent draws: examples are, the tokens of one example are not.
    """
    rows, group = _tokens(outputs, example)
    sums = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums / np.bincount(group)[:, None]


def norm_shift(table: pd.DataFrame, *, draws: int = 5000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Change of the attention-output norm by task, method and layer, paired by example, with its interval.

    `table`: one row per `task`, `method`, `seed`, `layer` and `example` with `before` and `after` (see
    `norms_by_example`); every seed has the same examples. Columns of the result: mean `before` and `after`,
    `difference`, `low`, `high`, `here_low`, `here_high`, `holds_for`, `percent` (of before), `n_examples`, `n_seeds`.

    Generalises to: `low`, `high`, other seeds and other examples of the same task. With S seeds and n examples,
    h² = (t_{S−1} s_seeds/√S)² + (t_{n−1} s_examples/√n)² adds the squared half-widths of Student's intervals over the
    means of seeds and over the means of examples. With two seeds t is 12.7, so that a shift must be large compared with
    the difference between the seeds. `here_low`, `here_high`: these trained models on other examples (bootstrap over
    examples, `draws` times from `seed`). One seed says nothing about others: both intervals are then the second one.
    `holds_for` is "this seed, other examples" then, and "other seeds and examples" otherwise.

    Simulated: where seed means differ by 0.5 or 1.0 of the spread between examples, `low` to `high` leaves out a shift
    of zero in 2 to 5 % of tables at two and at three seeds (a bootstrap over both: 28 and 43 % at two, 17 and 19 % at
    three), and covers the true one in 0.95 or more; a shift of four standard deviations between seeds is found in 0.90
    of tables at three seeds and 0.35 at two. `pytest tests/studies/test_attention_shift.py -k simulated`.
    """
    require_columns("table", table, *GROUP, "seed", "example", "before", "after")
    rows: list[dict[str, Any]] = []
    for named, part in table.groupby(GROUP, sort=False):
        wide = part.assign(change=part["after"] - part["before"]).pivot(
            index="seed", columns="example", values="change"
        )
        if wide.isna().any(axis=None):
            raise DataError(f"the seeds of {dict(zip(GROUP, named, strict=True))} have different examples")
        changes = wide.to_numpy()
        here = hierarchical_bootstrap([changes.mean(axis=0)], draws=draws, level=level, seed=seed).iloc[0]
        estimate, alone = float(here["estimate"]), len(changes) == 1
        reach = 0.0 if alone else _reach(changes, level)
        before = float(part["before"].mean())
        rows.append(
            {
                **dict(zip(GROUP, named, strict=True)),
                "before": before,
                "after": float(part["after"].mean()),
                "difference": estimate,
                "low": here["low"] if alone else estimate - reach,
                "high": here["high"] if alone else estimate + reach,
                "here_low": here["low"],
                "here_high": here["high"],
                "holds_for": "this seed, other examples" if alone else "other seeds and examples",
                "percent": 100 * estimate / before,
                "n_examples": wide.shape[1],
                "n_seeds": wide.shape[0],
            }
        )
    return pd.DataFrame(rows)


def _reach(values: np.ndarray, level: float) -> float:
    """Half the interval of the mean of `values` [seeds, examples] for other seeds and other examples."""
    halves = [
        student.ppf((1 + level) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
        for means in (values.mean(axis=1), values.mean(axis=0))
        if len(means) > 1
    ]
    return float(np.hypot.reduce(halves))


def cka_debiased(first: ArrayLike, second: ArrayLike) -> float:
    """Linear CKA with the unbiased HSIC estimator, of paired rows [n, p] and [n, q], n >= 4.

    HSIC_1(K, L) = [tr(K̃L̃) + (1ᵀK̃1)(1ᵀL̃1) / ((n-1)(n-2)) - 2/(n-2) · 1ᵀK̃L̃1] / (n(n-3)) with K̃ = XXᵀ, L̃ = YYᵀ,
    both with their diagonals set to zero (Song et al. 2012, equation 5); CKA = HSIC_1(K, L) / √(HSIC_1(K, K)
    HSIC_1(L, L)) (Nguyen, Raghu and Kornblith 2021). About 0 for independent data whatever n and width; it may fall
    below 0. NaN where one side does not vary.
    """
    one, two = _gram(first), _gram(second)
    if len(one) != len(two):
        raise DataError(f"first has {len(one)} rows and second {len(two)}; they are paired")
    if len(one) < 4:
        raise DataError(f"n={len(one)} rows are too few; the unbiased estimator needs 4")
    scale = _hsic(one, one) * _hsic(two, two)
    return float(_hsic(one, two) / np.sqrt(scale)) if scale > 0 else float("nan")


def cka_biased(first: ArrayLike, second: ArrayLike) -> float:
    """The usual linear CKA, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred columns (Kornblith et al. 2019).

    Far above 0 for independent data with few rows compared with the width; given for comparison with `cka_debiased`.
    """
    one, two = _gram(first), _gram(second)
    scale = (one**2).sum() * (two**2).sum()
    return float((one * two).sum() / np.sqrt(scale)) if scale > 0 else float("nan")


def _gram(rows: ArrayLike) -> np.ndarray:
    values = np.asarray(rows, np.float64)
    values = values - values.mean(
        axis=0
    )  # the unbiased estimate does not depend on it, except for its rounding
    return np.asarray(values @ values.T)


def _hsic(first: np.ndarray, second: np.ndarray) -> float:
    n = len(first)
    k, m = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    whole = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((whole - 2 / (n - 2) * (k.sum(axis=0) @ m.sum(axis=0))) / (n * (n - 3)))


def shift_text(shift: pd.DataFrame) -> pd.DataFrame:
    """A `norm_shift` table to show: change in per cent by method and task (rows) and layer, marked where it is clear.

    `" *"`: the interval for other seeds and texts leaves zero out; `" °"`: only that for these models on other texts.
    """
    clear, here = _clear(shift, "low", "high"), _clear(shift, "here_low", "here_high")
    marks = np.where(clear, " *", np.where(here, " °", ""))
    text = [f"{percent:+.0f} %{mark}" for percent, mark in zip(shift["percent"], marks, strict=True)]
    return shift.assign(text=text).pivot(index=["method", "task"], columns="layer", values="text")


def shift_counts(shift: pd.DataFrame) -> pd.DataFrame:
    """By method, in how many of all layers and tasks the norm surely grows or falls, and where it changes most.

    `shift` is a `norm_shift` table. Columns: `cells`, `grows` and `falls` (other seeds and texts), `grows_here` and
    `falls_here` (these models, other texts); `most` (in per cent), `task` and `layer` of the largest change.
    """
    rows = {}
    for method, part in shift.groupby("method"):
        top = part.iloc[int(part["percent"].abs().to_numpy().argmax())]
        rows[method] = {
            "cells": len(part),
            "grows": int((part["low"] > 0).sum()),
            "falls": int((part["high"] < 0).sum()),
            "grows_here": int((part["here_low"] > 0).sum()),
            "falls_here": int((part["here_high"] < 0).sum()),
            "most": top["percent"],
            "task": top["task"],
            "layer": top["layer"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _clear(table: pd.DataFrame, low: str, high: str) -> pd.Series:
    return (table[low] > 0) | (table[high] < 0)


def polynomial_fits(
    before: ArrayLike, after: ArrayLike, example: ArrayLike, fitted: Sequence[int] | np.ndarray
) -> pd.DataFrame:
    """How well a polynomial in one coordinate before gives the same coordinate after, on examples it was not fitted on.

    `before`, `after`: [tokens, width]; `example`: [tokens]; `fitted`: the examples whose tokens are used for the least
    squares fits, one per coordinate j and degree: after_j ≈ Σ_k c_jk before_j^k (each coordinate standardised first).
    All other examples are held out.

    One row per held-out example: `example`, `total`, and `unchanged` (after = before), `linear`, `quadratic`,
    `cubic`: the example's share Σ_t (residual)² / SST_j, averaged over coordinates, where SST_j is the sum of squares
    of after_j about its mean over all held-out tokens; `total` is the share of the mean itself. 1 - Σ linear / Σ total
    is thus the mean R² over coordinates.
    """
    x, group = _tokens(before, example)
    y, _ = _tokens(after, example)
    if x.shape != y.shape:
        raise DataError(f"before has shape {x.shape} and after {y.shape}; they are paired")
    inside = np.isin(group, np.asarray(fitted))
    if not inside.any() or inside.all():
        raise ArgumentError("fitted must name some examples and leave some out")
    centre, spread = x[inside].mean(axis=0), x[inside].std(axis=0)
    scaled = (x - centre) / np.where(spread > 0, spread, 1.0)
    held = ~inside
    deviation = (y[held] - y[held].mean(axis=0)) ** 2
    total = deviation.sum(axis=0)
    varies = total > 0
    errors = {"total": deviation, "unchanged": (y[held] - x[held]) ** 2}
    for name, degree in DEGREES.items():
        errors[name] = (y[held] - _fit(scaled, y, inside, degree)[held]) ** 2
    names = np.unique(group[held])
    shares = {
        name: np.bincount(group[held], (error[:, varies] / total[varies]).mean(axis=1))[names]
        if varies.any()
        else np.zeros(len(names))
        for name, error in errors.items()
    }
    return pd.DataFrame({"example": names, **shares})


def _fit(x: np.ndarray, y: np.ndarray, inside: np.ndarray, degree: int) -> np.ndarray:
    """Predictions for all rows; least squares of every column on the powers of its own x over the rows `inside`."""
    powers = np.stack([x**k for k in range(degree + 1)], axis=-1)  # [tokens, width, degree + 1]
    normal = np.einsum("tji,tjk->jik", powers[inside], powers[inside])
    target = np.einsum("tji,tj->ji", powers[inside], y[inside])
    coefficients = np.einsum("jik,jk->ji", np.linalg.pinv(normal, hermitian=True), target)
    return np.asarray(np.einsum("tjk,jk->tj", powers, coefficients))


def fit_summary(
    table: pd.DataFrame, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Held-out R² of each fit, and the gain of each degree over the one below, by task, method and layer.

    `table`: that of `polynomial_fits`, with `task`, `method`, `seed` and `layer`. One row per group and `fit`: `r2`,
    `low`, `high`; `gain` over the fit before it (linear over unchanged), `gain_low`, `gain_high`; `n_examples`,
    `n_seeds`. Generalises to: other examples for these trained models (bootstrap; one draw of examples serves all seeds
    and fits), not to other seeds.

    Simulated: in noise a further degree is said to gain in 5 % of tables at most.
    `pytest tests/studies/test_attention_shift.py -k noise`.
    """
    require_columns("table", table, *GROUP, "seed", "example", "total", *FITS)
    tail = [(1 - level) / 2, (1 + level) / 2]
    rows: list[dict[str, Any]] = []
    for named, part in table.groupby(GROUP, sort=False):
        seeds = part["seed"].nunique()
        sums = part.groupby("example")[["total", *FITS]].sum() / seeds
        count = len(sums)
        weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
        weights = np.vstack([np.ones(count, int), weights])  # the sample itself comes first
        drawn = weights @ sums.to_numpy()
        r2 = (
            1 - drawn[:, 1:] / drawn[:, :1]
            if (drawn[:, 0] > 0).all()
            else np.full((draws + 1, len(FITS)), np.nan)
        )
        gain = np.diff(r2, axis=1, prepend=np.nan)
        for column, fit in enumerate(FITS):
            row: dict[str, Any] = {**dict(zip(GROUP, named, strict=True)), "fit": fit, "r2": r2[0, column]}
            row["low"], row["high"] = np.quantile(r2[1:, column], tail)
            row["gain"] = gain[0, column]
            row["gain_low"], row["gain_high"] = np.quantile(gain[1:, column], tail)
            rows.append({**row, "n_examples": count, "n_seeds": seeds})
    return pd.DataFrame(rows)


def cka_summary(table: pd.DataFrame) -> pd.DataFrame:
    """CKA before against after by task, method and layer, and its ceiling: after against after of another seed.

    `table`: one row per `task`, `method`, `seed` and `layer` (further rows are ignored) with `cka`, `cka_biased`,
    `cka_seeds` (NaN without a second seed). Columns of the result: means over seeds, `n_seeds`, and the range `low`,
    `high` of `cka` over these seeds, which is no interval for other seeds.
    """
    require_columns("table", table, *GROUP, "seed", "cka", "cka_biased", "cka_seeds")
    groups = table.drop_duplicates([*GROUP, "seed"]).groupby(GROUP, sort=False)
    summary = groups.agg(
        cka=("cka", "mean"),
        low=("cka", "min"),
        high=("cka", "max"),
        cka_biased=("cka_biased", "mean"),
        cka_seeds=("cka_seeds", "mean"),
        n_seeds=("seed", "nunique"),
    )
    return summary.reset_index()


def _tokens(outputs: ArrayLike, example: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    rows, group = np.asarray(outputs, np.float64), np.asarray(example)
    if rows.ndim != 2 or group.shape != rows.shape[:1] or not rows.size:
        raise DataError(
            f"outputs of shape {rows.shape} and example of shape {group.shape}: give one example per row"
        )
    check_range("example", int(group.min()), least=0)
    return rows, group
