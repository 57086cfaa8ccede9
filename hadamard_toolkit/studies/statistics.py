"""Intervals, tests, equivalence and power for scores over seeds, examples and tasks.

Pure functions: arrays or tables in, tidy tables out. The tests themselves are SciPy's and statsmodels'. What every
claim of the other studies rests on: a mean over tasks or over seeds with its interval (`mean_over`), an interval over
seeds and examples (`hierarchical_bootstrap`), a test with Holm's correction (`paired_tests`), equivalence within a
stated margin (`tost`), and what so few seeds could have shown at all (`power`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_range

FEW_VALUES = 16  # up to so many different values, counts are drawn instead of examples: the same distribution
ALL_TASKS = "all tasks"
CORRELATIONS = ("matthews", "pearson", "spearman")


def mean_over(
    table: pd.DataFrame,
    value: str = "score",
    *,
    over: str = "task",
    by: str | Sequence[str] = (),
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean over tasks with its t interval; or over seeds, or over what else the column `over` names.

    All rows of one task are averaged first, so a task with more runs weighs no more; then mean ± t · sd / √n over the n
    tasks, on n − 1 degrees of freedom. `by` names columns: one interval for each of their values.

    Generalises to: other tasks (or other seeds: other units of `over`) of the same kind, not to anything below them.
    Nested rows do not belong into one mean: where the rows of K = 100 lie inside those of K = 500, give `by="rows"`
    (an interval within each K) or `over="seed"`. A percentile bootstrap over so few units is too narrow.

    Columns: those of `by`, `over`, `mean`, `low`, `high`, `level`, `n` (tasks), `averaged` (rows). `low` and `high` are
    NaN for one task. Raises `DataError` for values that are not finite, and where a column `metric` says that
    accuracies and correlations would be averaged into one number.

    Simulated: coverage of a 95 % interval 0.95 at 3, 5 and 8 tasks with normal effects, 0.88 to 0.90 at 8 with
    skewed ones (exponential; log-normal 0.84); a percentile bootstrap has 0.75, 0.84 and 0.88. Size over seeds with
    rows nested in rows 0.05.
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k "mean_over or nested"`
    """
    check_range("level", level, above=0, below=1)
    groups = [by] if isinstance(by, str) else list(by)
    _require(table, over, value, *groups)
    if not np.isfinite(table[value].to_numpy(dtype=float)).all():
        raise DataError(f"table[{value!r}] holds values that are not finite; leave those rows out first")
    parts = table.groupby(groups, sort=False) if groups else [((), table)]
    rows = []
    for names, part in parts:
        one_kind(part)
        units = part.groupby(over)[value].mean().to_numpy(dtype=float)
        mean, low, high = t_interval(units, level=level)
        told = {"over": over, "mean": mean, "low": low, "high": high, "level": level}
        rows.append({**dict(zip(groups, names, strict=True)), **told, "n": len(units), "averaged": len(part)})
    return pd.DataFrame(rows, columns=[*groups, "over", "mean", "low", "high", "level", "n", "averaged"])


def t_interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values and its t interval, NaN for fewer than two."""
    from scipy import stats

    n = len(values)
    mean = float(np.mean(values)) if n else np.nan
    if n < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def greater(values: np.ndarray) -> float:
    """One-sided p of a t test of a mean of at most zero; NaN for fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return np.nan
    if np.ptp(values) == 0:  # no spread: certain either way
        return 0.0 if values[0] > 0 else 1.0
    return float(stats.ttest_1samp(values, 0.0, alternative="greater").pvalue)


def one_kind(table: pd.DataFrame) -> None:
    """Refuse a table whose column `metric`, if it has one, holds both correlations and shares of right answers."""
    if "metric" not in table.columns:
        return
    metrics = sorted(set(table["metric"]))
    if len({metric in CORRELATIONS for metric in metrics}) > 1:
        raise DataError(
            f"table holds scores of {', '.join(metrics)}, which have no common unit; give those of one kind, or scores "
            "normalised between the constant answer and full fine-tuning (studies.normalised_scores)"
        )


def hierarchical_bootstrap(
    values: Sequence[ArrayLike],
    other: Sequence[ArrayLike] | None = None,
    *,
    examples: str = "own",
    draws: int = 5000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Percentile interval of a mean over seeds and their examples; of a paired difference if `other` is given.

    In each draw, S of the S seeds are drawn with replacement, then n_s of the n_s examples of each:
    θ* = (1/S) Σ_s mean_i x[s*, i*]; the interval is the middle `level` of the θ* (Davison and Hinkley 1997, section
    3.8; Bouthillier et al. 2021 on why seeds must be drawn too). A draw takes an example of both methods or of none.

    Parameters
    ----------
    values: one array of numbers per seed, such as correct or not, row by row; [seeds, examples] is one too.
    other: the same of the method to compare with; the estimate is then mean(values) − mean(other).
    examples: `"own"` if every seed has rows of its own (held-out rows), `"shared"` if row i is the same for all
        seeds (test rows): then one draw of examples serves all seeds of a draw (crossed; Owen 2007), and they must be
        equally many.

    One row: `estimate`, `low`, `high`, `level`, `n_seeds`, `n_examples` (of all seeds together, shared ones once).

    Generalises to: other rows; to other seeds with about ten of them. With very few seeds the interval is too narrow
    where seeds differ more than examples do (the spread of S drawn seeds is (S − 1)/S of the true one), and too wide
    where they do not: `mean_over` by seed is right then. One seed tells nothing about other seeds.

    Simulated: covers 0.92 with 10 seeds that differ, 0.95 and more where they do not.
    `pytest tests/studies/test_statistics.py -k bootstrap`
    """
    check_choice("examples", examples, ("own", "shared"))
    check_range("draws", draws, least=1)
    check_range("level", level, above=0, below=1)
    seeds = _by_seed(values, other)
    generator = np.random.default_rng(seed)
    count = len(seeds)
    chosen = generator.integers(count, size=(draws, count))
    if examples == "own":
        means = np.empty((draws, count))
        for place, own in enumerate(seeds):
            here = chosen == place
            means[here] = _resampled_means(own, int(here.sum()), generator)
        drawn = means.mean(axis=1)
        size = sum(map(len, seeds))
    else:
        if len({len(own) for own in seeds}) > 1:
            raise DataError(
                f"examples='shared' needs equally many per seed; there are {[len(own) for own in seeds]}"
            )
        matrix = np.stack(seeds)
        size = matrix.shape[1]
        weights = np.stack([(chosen == place).sum(axis=1) for place in range(count)], axis=1) / count
        drawn = np.concatenate(
            [
                ((part @ matrix) * generator.multinomial(size, np.full(size, 1 / size), len(part))).sum(
                    axis=1
                )
                / size
                for part in np.array_split(weights, -(-draws // 1000))
            ]
        )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    estimate = float(np.mean([own.mean() for own in seeds]))
    told = {"estimate": estimate, "low": float(low), "high": float(high), "level": level}
    return pd.DataFrame([{**told, "n_seeds": count, "n_examples": size}])


def paired_tests(scores: pd.DataFrame, control: str, *, test: str = "t", alpha: float = 0.05) -> pd.DataFrame:
    """Every method against `control`, paired by seed within each task and by task over all of them, with Holm's step.

    `scores`: `task`, `method`, `seed`, `score`, one row per run. Within a task, d_s = score − score of the control with
    the same seed. Over tasks, d_t is the mean of d_s in task t, so that a task with more seeds weighs no more (Demšar
    2006). `test` is `"t"` (t = mean(d) / (sd(d)/√n), n − 1 degrees of freedom) or `"wilcoxon"` (signed ranks; exact
    for small n, and unable to go below 2^(1−n)). `p_holm` is corrected over all tasks and methods (Holm 1979), in one
    family for tasks and one for `"all tasks"`.

    Generalises to: other seeds of the task; for `"all tasks"`, other tasks.

    Simulated: a false claim in 0.05 of studies after Holm.
    `pytest tests/studies/test_statistics.py -k familywise`

    Columns: `task`, `method`, `control`, `n` (pairs), `difference`, `sd`, `low`, `high` (1 − alpha, by t), `p`,
    `p_holm`, `significant` (p_holm <= alpha). With fewer than two pairs, or with t and differences that are
    all the same and not zero, p is NaN: there is no spread to judge by. Such a comparison has no part in the
    correction.
    """
    check_choice("test", test, ("t", "wilcoxon"))
    check_range("alpha", alpha, above=0, below=1)
    _require(scores, "task", "method", "seed", "score")
    if (twice := scores.duplicated(["task", "method", "seed"])).any():
        first = scores.loc[twice, ["task", "method", "seed"]].iloc[0].to_dict()
        raise DataError(f"scores has more than one row for {first}; one row per run is compared")
    check_choice("control", control, sorted(set(scores["method"])))
    one_kind(scores)
    wide = scores.pivot(index=["task", "seed"], columns="method", values="score")
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(scores["method"]):
        if method == control:
            continue
        pairs = (wide[method] - wide[control]).dropna()
        by_task = {task: part.to_numpy() for task, part in pairs.groupby("task")}
        means = np.array([part.mean() for part in by_task.values()])
        for task, differences in {**by_task, ALL_TASKS: means}.items():
            rows.append(
                {"task": task, "method": method, "control": control, **_compared(differences, test, alpha)}
            )
    table = pd.DataFrame(rows)
    table["p_holm"] = np.nan
    for whole in (False, True):
        family = (table["task"] == ALL_TASKS) == whole
        table.loc[family, "p_holm"] = holm(table.loc[family, "p"])
    return table.assign(significant=table["p_holm"] <= alpha)


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p, max_{j<=i} min(1, (m − j + 1) p_(j)); NaN stays and does not count.

    The same as statsmodels' `multipletests`, which collects garbage at every call, a quarter of a second each.
    Simulated: a false claim in 0.05 of families of 8. `pytest tests/studies/test_statistics.py -k familywise`
    """
    values = np.asarray(p, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted


def tost(differences: ArrayLike, margin: float, *, alpha: float = 0.05) -> pd.DataFrame:
    """Two one-sided t tests: is the mean of paired `differences` within ± `margin` (Schuirmann 1987)?

    H0 is that it is not. `p_lower` tests mean <= −margin (a small one: not worse), `p_upper` mean >= margin (a small
    one: not better), and p = max of the two. Equivalent at `alpha` exactly if the 1 − 2 alpha interval `low`, `high`
    lies within the margin. `margin` is in the units of the score and must be stated before looking.

    Generalises to: other pairs of the kind that was given (seeds, or means of tasks).

    Simulated: a mean at the margin passes in 0.05. `pytest tests/studies/test_statistics.py -k equivalence`

    One row: `n`, `difference`, `low`, `high`, `margin`, `p_lower`, `p_upper`, `p`, `equivalent`.
    """
    check_range("margin", margin, above=0)
    check_range("alpha", alpha, above=0, below=0.5)
    values = _numbers("differences", differences)
    told = {"n": len(values), "difference": values.mean(), "margin": margin}
    if len(values) < 2:
        nothing = dict.fromkeys(("low", "high", "p_lower", "p_upper", "p"), np.nan)
        return pd.DataFrame([{**told, **nothing, "equivalent": False}])
    if not np.ptp(values):  # no spread: statsmodels would divide by zero
        mean = float(values[0])
        low = high = mean
        p_lower, p_upper = float(mean <= -margin), float(mean >= margin)
    else:
        from statsmodels.stats.weightstats import DescrStatsW

        described = DescrStatsW(values)
        low, high = described.tconfint_mean(alpha=2 * alpha)
        _, (_, p_lower, _), (_, p_upper, _) = described.ttost_mean(-margin, margin)
    p = max(p_lower, p_upper)
    found = {"low": low, "high": high, "p_lower": p_lower, "p_upper": p_upper, "p": p}
    columns = ["n", "difference", "low", "high", "margin", "p_lower", "p_upper", "p", "equivalent"]
    return pd.DataFrame([{**told, **found, "equivalent": bool(p <= alpha)}])[columns]


def mcnemar(correct: ArrayLike, other: ArrayLike) -> pd.DataFrame:
    """Exact McNemar test of two methods on the same rows: do they differ in how often they alone are right?

    `correct` and `other`: right or not, [rows] of one seed, or [seeds, rows] to pool the seeds. With b rows that only
    the first has right and c that only the second has, b ~ Binomial(b + c, 1/2) under H0 (McNemar 1947; Dietterich
    1998); two-sided, by statsmodels. Generalises to: other rows for these trained models, not to other seeds; and
    pooled rows that several seeds share are not independent, which makes the pooled p too small.
    Simulated: size at most 0.05. `pytest tests/studies/test_statistics.py -k mcnemar`

    One row: `only_first`, `only_second`, `n` (rows), `difference` (of the two accuracies), `p`.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact

    first, second = np.asarray(correct), np.asarray(other)
    if first.shape != second.shape or not first.size:
        raise DataError(
            f"correct of shape {first.shape} and other of shape {second.shape}: give equal ones, not empty"
        )
    for name, values in (("correct", first), ("other", second)):
        if not np.isin(values, (0, 1)).all():
            raise DataError(f"{name} holds values besides 0 and 1; it says which rows are right")
    first, second = first.astype(bool), second.astype(bool)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    table = [[int((first & second).sum()), b], [c, int((~first & ~second).sum())]]
    p = float(exact(table, exact=True).pvalue)
    told = {"only_first": b, "only_second": c, "n": first.size}
    return pd.DataFrame([{**told, "difference": (b - c) / first.size, "p": p}])


def power(
    n: int | Iterable[int], *, sd: float = 1.0, alpha: float = 0.05, power: float = 0.8
) -> pd.DataFrame:
    """What n pairs could have shown: the least difference that a two-sided paired t test finds with `power`.

    Solves P(|t'| > t_{1 − alpha/2, n − 1}) = power for the noncentrality δ√n of t', by statsmodels (Cohen 1988);
    the tail of significant differences with the wrong sign, below 10⁻⁴, is left out. The detectable difference is δ ·
    `sd`, with `sd` the standard deviation of the paired differences.

    Simulated: an effect of that size is found as often as promised. `pytest tests/studies/test_statistics.py -k effect`

    One row per n: `n`, `alpha`, `power`, `effect` (δ, in standard deviations), `sd`, `detectable`.
    """
    check_range("sd", sd, least=0)
    check_range("alpha", alpha, above=0, below=1)
    check_range("power", power, above=alpha, below=1)
    sizes = [n] if isinstance(n, int | np.integer) else list(n)
    for size in sizes:
        check_range("n", size, least=2)
    effects = [_detectable(int(size), alpha, power) for size in sizes]
    table = pd.DataFrame({"n": sizes, "alpha": alpha, "power": power, "effect": effects, "sd": sd})
    return table.assign(detectable=table["effect"] * sd)


def _detectable(n: int, alpha: float, power: float) -> float:
    from scipy.optimize import brentq
    from statsmodels.stats.power import TTestPower

    def missing(effect: float) -> float:
        # the upper tail: far out SciPy's sum of both is NaN, and there the lower one is nothing
        return float(TTestPower().power(effect, n, alpha / 2, alternative="larger")) - power

    most = 1.0  # widened step by step, for the same reason; solve_power's own bracket fails for two pairs
    while missing(most) < 0:
        most *= 1.5
    return float(brentq(missing, 0.0, most))


def _compared(differences: np.ndarray, test: str, alpha: float) -> dict[str, Any]:
    from scipy import stats

    mean, low, high = t_interval(differences, level=1 - alpha)
    told: dict[str, Any] = {"n": len(differences), "difference": mean}
    if len(differences) < 2:
        return {**told, "sd": np.nan, "low": np.nan, "high": np.nan, "p": np.nan}
    if not differences.any():
        p = 1.0
    elif test == "wilcoxon":
        p = float(stats.wilcoxon(differences).pvalue)
    elif np.ptp(differences):
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    else:
        p = np.nan
    return {**told, "sd": differences.std(ddof=1), "low": low, "high": high, "p": p}


def _resampled_means(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """`draws` means of a sample, each of as many values drawn with replacement."""
    size = len(values)
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) <= FEW_VALUES:
        return np.asarray(generator.multinomial(size, counts / size, draws) @ unique / size)
    return np.asarray(values[generator.integers(size, size=(draws, size))].mean(axis=1))


def _by_seed(values: Sequence[ArrayLike], other: Sequence[ArrayLike] | None) -> list[np.ndarray]:
    seeds = [_numbers("values", own) for own in values]
    if not seeds:
        raise DataError("values is empty; give one array per seed")
    if other is None:
        return seeds
    second = [_numbers("other", own) for own in other]
    if [len(own) for own in seeds] != [len(own) for own in second]:
        raise DataError(
            f"values has {[len(own) for own in seeds]} examples by seed and other {[len(own) for own in second]}; "
            "they are paired, example by example"
        )
    return [first - own for first, own in zip(seeds, second, strict=True)]


def _numbers(argument: str, values: ArrayLike) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise DataError(
            f"{argument} must hold finite numbers in one dimension, at least one; it has shape {found.shape}"
        )
    return found


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ArgumentError(
            f"table has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, table.columns))}"
        )
