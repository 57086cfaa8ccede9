"""Intervals, tests, equivalence and power for scores over seeds, examples and tasks.

The claims of the other studies rest on these functions: a mean over tasks or seeds with its interval (`mean_over`), an
interval over seeds and examples (`hierarchical_bootstrap`), a test with Holm's correction (`paired_tests`), equivalence
within a stated margin (`tost`), and what so few seeds could have shown at all (`power`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special, stats

from hadamard_toolkit.errors import DataError, check_choice, check_range
from hadamard_toolkit.studies.frames import require_columns

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
    """Mean over tasks, or over the seeds or other units that the column `over` names, with its t interval.

    All rows of one task are averaged first, so that a task with more runs has no more weight; then mean ± t · sd / √n
    over the n tasks, on n − 1 degrees of freedom. `by` names columns: one interval for each of their values.

    Generalises to: other tasks (or seeds, or other units of `over`) of the same kind, not to anything below them.
    Nested rows must not be averaged together: where the rows of K = 100 are part of those of K = 500, pass `by="rows"`
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
    require_columns("table", table, over, value, *groups)
    if not np.isfinite(table[value].to_numpy(dtype=float)).all():
        raise DataError(f"table[{value!r}] holds values that are not finite; leave those rows out first")
    parts = table.groupby(groups, sort=False) if groups else [((), table)]
    rows = []
    for names, part in parts:
        one_kind(part)
        units = part.groupby(over)[value].mean().to_numpy(dtype=float)
        mean, low, high = t_interval(units, level=level)
        interval = {"over": over, "mean": mean, "low": low, "high": high, "level": level}
        sizes = {"n": len(units), "averaged": len(part)}
        rows.append({**dict(zip(groups, names, strict=True)), **interval, **sizes})
    return pd.DataFrame(rows, columns=[*groups, "over", "mean", "low", "high", "level", "n", "averaged"])


def t_interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values and its t interval, NaN for fewer than two."""
    n = len(values)
    mean = float(np.mean(values)) if n else np.nan
    if n < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def greater(values: np.ndarray) -> float:
    """One-sided p of a t test of a mean of at most zero; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan
    if np.ptp(values) == 0:  # no spread: certain either way
        return 0.0 if values[0] > 0 else 1.0
    return float(stats.ttest_1samp(values, 0.0, alternative="greater").pvalue)


def one_kind(table: pd.DataFrame) -> None:
    """Raise `DataError` if the column `metric` of `table` holds both correlations and shares of right answers.

    A table without that column passes.
    """
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
    """Percentile interval of a mean over seeds and their examples, or of a paired difference if `other` is given.

    In each draw, S of the S seeds are drawn with replacement, then n_s of the n_s examples of each:
    θ* = (1/S) Σ_s mean_i x[s*, i*]; the interval is the middle `level` of the θ* (Davison and Hinkley 1997, section
    3.8; Bouthillier et al. 2021 on why seeds must be drawn too). An example is drawn for both methods or for neither.

    Parameters
    ----------
    values: one array of numbers per seed, such as 1 for each correct row and 0 for the others; or an array
        [seeds, examples].
    other: the same for the method to compare with; the estimate is then mean(values) − mean(other).
    examples: `"own"` if every seed has rows of its own (held-out rows); `"shared"` if row i is the same for all
        seeds (test rows). Then all seeds have equally many rows, and share one draw of them (crossed; Owen 2007).

    One row: `estimate`, `low`, `high`, `level`, `n_seeds`, `n_examples` (of all seeds; shared ones count once).

    Generalises to: other rows, and to other seeds if there are about ten. With very few seeds the interval is too
    narrow where seeds differ more than examples do (the spread of S drawn seeds is (S − 1)/S of the true one), and too
    wide where they do not; use `mean_over` by seed there. One seed says nothing about other seeds.

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
        for index, numbers in enumerate(seeds):
            here = chosen == index
            means[here] = _resampled_means(numbers, int(here.sum()), generator)
        drawn = means.mean(axis=1)
        size = sum(map(len, seeds))
    else:
        if len({len(numbers) for numbers in seeds}) > 1:
            raise DataError(
                f"examples='shared' needs equally many per seed; there are {[len(numbers) for numbers in seeds]}"
            )
        matrix = np.stack(seeds)
        size = matrix.shape[1]
        weights = np.stack([(chosen == index).sum(axis=1) for index in range(count)], axis=1) / count
        parts = []
        for part in np.array_split(weights, -(-draws // 1000)):  # in parts, to save memory
            times = generator.multinomial(size, np.full(size, 1 / size), len(part))
            parts.append(((part @ matrix) * times).sum(axis=1) / size)
        drawn = np.concatenate(parts)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    estimate = float(np.mean([numbers.mean() for numbers in seeds]))
    interval = {"estimate": estimate, "low": float(low), "high": float(high), "level": level}
    return pd.DataFrame([{**interval, "n_seeds": count, "n_examples": size}])


def paired_tests(scores: pd.DataFrame, control: str, *, test: str = "t", alpha: float = 0.05) -> pd.DataFrame:
    """Compare every method with `control`, paired by seed within each task and by task over all tasks.

    `scores`: `task`, `method`, `seed`, `score`, one row per run. Within a task, d_s = score − score of the control with
    the same seed. Over tasks, d_t is the mean of d_s in task t, so that a task with more seeds has no more weight
    (Demšar 2006). `test` is `"t"` (t = mean(d) / (sd(d)/√n), n − 1 degrees of freedom) or `"wilcoxon"` (signed ranks;
    exact for small n, p is at least 2^(1−n)). `p_holm` is corrected over all tasks and methods (Holm 1979), in one
    family for single tasks and one for `"all tasks"`.

    Generalises to: other seeds of the task; for `"all tasks"`, other tasks.

    Simulated: a false claim in 0.05 of studies after Holm.
    `pytest tests/studies/test_statistics.py -k familywise`

    Columns: `task`, `method`, `control`, `n` (pairs), `difference`, `sd`, `low`, `high` (1 − alpha, by t), `p`,
    `p_holm`, `significant` (p_holm <= alpha). p is NaN with fewer than two pairs, and for t where all differences are
    the same and not zero: there is no spread to judge by. Such a comparison does not count in the correction.
    """
    check_choice("test", test, ("t", "wilcoxon"))
    check_range("alpha", alpha, above=0, below=1)
    require_columns("scores", scores, "task", "method", "seed", "score")
    if (twice := scores.duplicated(["task", "method", "seed"])).any():
        first = scores.loc[twice, ["task", "method", "seed"]].iloc[0].to_dict()
        raise DataError(f"scores has more than one row for {first}; give one row per run")
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
    """Holm's (1979) adjusted p, max_{j<=i} min(1, (m − j + 1) p_(j)); NaN stays NaN and does not count.

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

    The null is that it is not. `p_lower` tests mean <= −margin (small: not worse), `p_upper` mean >= margin (small: not
    better), and `p` is the larger one. Equivalent at `alpha` exactly if the 1 − 2 alpha interval `low`, `high` lies
    within the margin. `margin` is in the units of the score and must be stated before looking. NaN for one pair.

    Generalises to: other pairs of the kind that was given (seeds, or means of tasks).

    Simulated: a mean at the margin passes in 0.05. `pytest tests/studies/test_statistics.py -k equivalence`

    One row: `n`, `difference`, `low`, `high`, `margin`, `p_lower`, `p_upper`, `p`, `equivalent`.
    """
    check_range("margin", margin, above=0)
    check_range("alpha", alpha, above=0, below=0.5)
    values = _numbers("differences", differences)
    mean, low, high = t_interval(values, level=1 - 2 * alpha)
    p_lower, p_upper = greater(values + margin), greater(margin - values)
    p = max(p_lower, p_upper)
    interval = {"n": len(values), "difference": mean, "low": low, "high": high, "margin": margin}
    tests = {"p_lower": p_lower, "p_upper": p_upper, "p": p, "equivalent": bool(p <= alpha)}
    return pd.DataFrame([{**interval, **tests}])


def mcnemar(correct: ArrayLike, other: ArrayLike) -> pd.DataFrame:
    """Exact McNemar test of two methods on the same rows: do they differ in how often they alone are right?

    `correct` and `other`: right or not, [rows] of one seed, or [seeds, rows] to pool the seeds. With b rows that only
    the first has right and c that only the second has right, b ~ Binomial(b + c, 1/2) under the null (McNemar 1947;
    Dietterich 1998); two-sided. Generalises to: other rows for these trained models, not to other seeds. Pooled rows
    that several seeds share are not independent, which makes the pooled p too small.
    Simulated: size at most 0.05. `pytest tests/studies/test_statistics.py -k mcnemar`

    One row: `only_first`, `only_second`, `n` (rows), `difference` (of the two accuracies), `p`.
    """
    first, second = np.asarray(correct), np.asarray(other)
    if first.shape != second.shape or not first.size:
        raise DataError(
            f"correct of shape {first.shape} and other of shape {second.shape}: give equal ones, not empty"
        )
    for name, values in (("correct", first), ("other", second)):
        if not np.isin(values, (0, 1)).all():
            raise DataError(f"{name} holds values besides 0 and 1; it says which rows are right")
    b, c = int((first > second).sum()), int((first < second).sum())
    p = float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    difference = (b - c) / first.size
    return pd.DataFrame(
        [{"only_first": b, "only_second": c, "n": first.size, "difference": difference, "p": p}]
    )


def power(
    n: int | Iterable[int], *, sd: float = 1.0, alpha: float = 0.05, power: float = 0.8
) -> pd.DataFrame:
    """What n pairs could have shown: the least difference that a two-sided paired t test finds with `power`.

    Solves P(t' > t_{1 − alpha/2, n − 1}) = power for the noncentrality δ√n of t' (Cohen 1988); significant differences
    with the wrong sign, with a probability below 10⁻⁴, are left out. The detectable difference is δ · `sd`, with `sd`
    the standard deviation of the paired differences.

    Simulated: an effect of that size is found as often as promised. `pytest tests/studies/test_statistics.py -k effect`

    One row per n: `n`, `alpha`, `power`, `effect` (δ, in standard deviations), `sd`, `detectable`.
    """
    check_range("sd", sd, least=0)
    check_range("alpha", alpha, above=0, below=1)
    check_range("power", power, above=alpha, below=1)
    sizes = [n] if isinstance(n, int | np.integer) else list(n)
    for size in sizes:
        check_range("n", size, least=2)
    freedom = np.array(sizes) - 1
    noncentrality = special.nctdtrinc(freedom, 1 - power, stats.t.ppf(1 - alpha / 2, freedom))
    effect = noncentrality / np.sqrt(freedom + 1)
    columns = {"n": sizes, "alpha": alpha, "power": power, "effect": effect, "sd": sd}
    return pd.DataFrame({**columns, "detectable": effect * sd})


def power_of(values: np.ndarray, distance: float, *, alpha: float = 0.05) -> float:
    """The probability that a one-sided t test of so many values rejects, if their mean is `distance` beyond its null.

    The standard deviation is that of `values`: P(t' > t_{1 − alpha, n − 1}) for the noncentrality distance √n / sd.
    NaN for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return np.nan
    if (sd := float(np.std(values, ddof=1))) == 0:
        return 1.0
    return float(stats.nct.sf(stats.t.ppf(1 - alpha, n - 1), n - 1, distance * np.sqrt(n) / sd))


def _compared(differences: np.ndarray, test: str, alpha: float) -> dict[str, Any]:
    mean, low, high = t_interval(differences, level=1 - alpha)
    sd = differences.std(ddof=1) if len(differences) > 1 else np.nan
    p = np.nan
    if len(differences) > 1 and not differences.any():
        p = 1.0
    elif len(differences) > 1 and test == "wilcoxon":
        p = float(stats.wilcoxon(differences).pvalue)
    elif len(differences) > 1 and np.ptp(differences):
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    return {"n": len(differences), "difference": mean, "sd": sd, "low": low, "high": high, "p": p}


def _resampled_means(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """`draws` means of a sample, each of as many values drawn with replacement."""
    size = len(values)
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) <= FEW_VALUES:
        return np.asarray(generator.multinomial(size, counts / size, draws) @ unique / size)
    return np.asarray(values[generator.integers(size, size=(draws, size))].mean(axis=1))


def _by_seed(values: Sequence[ArrayLike], other: Sequence[ArrayLike] | None) -> list[np.ndarray]:
    """The numbers of each seed, or their paired differences."""
    seeds = [_numbers("values", numbers) for numbers in values]
    if not seeds:
        raise DataError("values is empty; give one array per seed")
    if other is None:
        return seeds
    second = [_numbers("other", numbers) for numbers in other]
    sizes, paired = [len(numbers) for numbers in seeds], [len(numbers) for numbers in second]
    if sizes != paired:
        raise DataError(
            f"values has {sizes} examples by seed and other {paired}; they are paired, example by example"
        )
    return [one - two for one, two in zip(seeds, second, strict=True)]


def _numbers(argument: str, values: ArrayLike) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise DataError(
            f"{argument} must hold finite numbers in one dimension, at least one; it has shape {numbers.shape}"
        )
    return numbers
