"""The statistics agree with closed forms and with SciPy, and keep their level on simulated noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.statistics import (
    ALL_TASKS,
    hierarchical_bootstrap,
    holm,
    mcnemar,
    mean_over,
    paired_tests,
    power,
    tost,
)

# means over tasks --------------------------------------------------------------------------------------------------


def test_a_mean_over_tasks_is_scipy_s_interval_of_the_task_means() -> None:
    table = scores(tasks=5, seeds=3).query("method == 'a'")
    table = pd.concat([table, table[table["task"] == "task 1"].assign(seed=9)])  # one task with more runs
    row = mean_over(table).iloc[0]
    means = table.groupby("task")["score"].mean()
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([means.mean(), *expected])
    assert (row["over"], row["n"], row["averaged"]) == ("task", 5, 18)
    by = mean_over(table, over="seed", by="task", level=0.9).set_index("task")
    assert by.index.tolist() == [f"task {task}" for task in range(5)]
    of_one = table[table["task"] == "task 2"]["score"]
    assert by.loc["task 2", "high"] == pytest.approx(
        stats.ttest_1samp(of_one, 0).confidence_interval(0.9).high
    )
    by_rows = mean_over(table.assign(rows=100), by="rows").iloc[0]
    assert (by_rows["rows"], by_rows["averaged"]) == (100, 18)
    alone = mean_over(table[table["task"] == "task 0"]).iloc[0]
    assert np.isnan([alone["low"], alone["high"]]).all(), "one task says nothing of other tasks"


def test_what_has_no_mean_is_refused() -> None:
    table = scores().query("method == 'a'")
    with pytest.raises(ArgumentError, match="no column 'gain'"):
        mean_over(table, "gain")
    with pytest.raises(DataError, match="not finite"):
        mean_over(table.assign(score=np.nan))
    metric = table["task"].map(lambda task: "spearman" if task == "task 0" else "accuracy")
    with pytest.raises(DataError, match="accuracy, spearman, which have no common unit"):
        mean_over(table.assign(metric=metric))
    assert len(mean_over(table.assign(metric=metric), by="metric")) == 2
    with pytest.raises(DataError, match="no common unit"):
        paired_tests(scores().assign(metric=["spearman", *["accuracy"] * (len(scores()) - 1)]), "control")


# bootstrap ---------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_one_seed_is_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    row = hierarchical_bootstrap([values], draws=20_000).iloc[0]
    assert row["estimate"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # of a percentile bootstrap, whose spread is the plug-in one
    assert [row["low"], row["high"]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.02)
    assert (row["n_seeds"], row["n_examples"]) == (1, 400)


def test_counts_of_few_values_and_examples_themselves_give_one_distribution() -> None:
    right = np.random.default_rng(1).random((3, 200)) < 0.8
    few = hierarchical_bootstrap(right, draws=20_000).iloc[0]
    jittered = hierarchical_bootstrap(right + np.linspace(0, 1e-9, 200), draws=20_000, seed=1).iloc[0]
    assert [few["low"], few["high"]] == pytest.approx([jittered["low"], jittered["high"]], abs=0.004)


@pytest.mark.parametrize("examples", ["own", "shared"])
def test_the_spread_of_seeds_and_examples_adds_up(examples: str) -> None:
    """Own rows: Var = (S−1)/S · s²(seed means)/S + mean within/(S n). Shared rows: the rows' part is not divided by
    S."""
    generator = np.random.default_rng(2)
    seeds, rows = 6, 150
    common = generator.normal(0, 1.0, rows) if examples == "shared" else 0.0
    values = generator.normal(0, 0.3, (seeds, 1)) + common + generator.normal(0, 0.5, (seeds, rows))
    row = hierarchical_bootstrap(values, examples=examples, draws=20_000).iloc[0]
    between = values.mean(axis=1).var() / seeds
    if examples == "own":
        expected = between + values.var(axis=1).mean() / rows / seeds
    else:  # E over drawn seeds of the variance of the rows' means: W'CW with E[ww'] = (I/S + (S−1)/S · 11'/S)/S
        covariance = np.cov(values, bias=True)
        mean_weights = np.full((seeds, seeds), (seeds - 1) / seeds**3) + np.eye(seeds) / seeds**2
        expected = between + (covariance * mean_weights).sum() / rows
    assert (row["high"] - row["low"]) / (2 * 1.96) == pytest.approx(np.sqrt(expected), rel=0.04)


def test_pairing_takes_the_noise_that_both_methods_share_out() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 5.0, (4, 100))
    first, second = hard + 0.5 + generator.normal(0, 0.1, (4, 100)), hard
    row = hierarchical_bootstrap(first, second).iloc[0]
    assert row["estimate"] == pytest.approx(0.5, abs=0.05)
    assert row["low"] > 0.4
    alone = hierarchical_bootstrap(first).iloc[0]
    assert row["high"] - row["low"] < (alone["high"] - alone["low"]) / 5


@pytest.mark.parametrize(("seed_sd", "least", "most"), [(1.0, 0.88, 0.96), (0.0, 0.95, 1.0)])
def test_coverage_of_the_bootstrap(seed_sd: float, least: float, most: float) -> None:
    """300 simulated studies of 10 seeds x 40 examples; the true mean is 0.

    Seeds that differ: a percentile interval from 10 seeds covers a little less than 95 % (plug-in spread and no t;
    about 0.92 in theory), and 300 simulations add ± 4 points (2.5 standard errors): 0.88 to 0.96. Seeds that do not
    differ: the examples' noise counts twice, so it covers more than 95 %.
    """
    generator = np.random.default_rng(4)
    covered = 0
    for study in range(300):
        values = generator.normal(0, seed_sd, (10, 1)) + generator.normal(0, 1.0, (10, 40))
        row = hierarchical_bootstrap(values, draws=300, seed=study).iloc[0]
        covered += row["low"] <= 0 <= row["high"]
    assert least <= covered / 300 <= most


def test_the_bootstrap_refuses_what_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="paired, example by example"):
        hierarchical_bootstrap([[1, 2]], [[1, 2, 3]])
    with pytest.raises(DataError, match="equally many per seed"):
        hierarchical_bootstrap([[1, 2], [1, 2, 3]], examples="shared")
    with pytest.raises(DataError, match="empty"):
        hierarchical_bootstrap([])
    with pytest.raises(DataError, match="finite"):
        hierarchical_bootstrap([[1.0, np.nan]])


# paired tests ------------------------------------------------------------------------------------------------------


def scores(effect: float = 0.0, tasks: int = 4, seeds: int = 5, *, start: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(start)
    rows = [
        (f"task {task}", method, seed, 0.8 + (method == "a") * effect + generator.normal(0, 0.02))
        for task in range(tasks)
        for seed in range(seeds)
        for method in ("a", "b", "control")
    ]
    return pd.DataFrame(rows, columns=["task", "method", "seed", "score"])


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_p_values_are_scipy_s(test: str) -> None:
    table = scores()
    found = paired_tests(table, "control", test=test)
    wide = table.pivot(index=["task", "seed"], columns="method", values="score")
    for row in found.itertuples():
        pairs = wide[row.method] - wide["control"]
        values = pairs.groupby("task").mean() if row.task == ALL_TASKS else pairs.loc[str(row.task)]
        expected = stats.ttest_1samp(values, 0) if test == "t" else stats.wilcoxon(values)
        assert row.p == pytest.approx(expected.pvalue)
        assert (row.n, row.difference) == (len(values), pytest.approx(values.mean()))
        if test == "t":
            interval = expected.confidence_interval(0.95)
            assert [row.low, row.high] == pytest.approx([interval.low, interval.high])
    assert set(found["task"]) == {"task 0", "task 1", "task 2", "task 3", ALL_TASKS}


def test_holm_is_stepped_by_hand_agrees_with_statsmodels_and_skips_what_is_unknown() -> None:
    assert holm([0.01, 0.04, np.nan, 0.03]) == pytest.approx([0.03, 0.06, np.nan, 0.06], nan_ok=True)
    assert np.isnan(holm([np.nan])).all()
    assert holm([]).shape == (0,)
    p = np.random.default_rng(0).random(20) ** 4
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_s_step_is_taken_in_one_family_of_tasks_and_in_another_of_all_tasks() -> None:
    found = paired_tests(scores(0.04, start=1), "control", alpha=0.1)
    whole = found["task"] == ALL_TASKS
    assert (whole.sum(), (~whole).sum()) == (2, 8)
    for family in (found[whole], found[~whole]):
        assert family["p_holm"].to_numpy() == pytest.approx(multipletests(family["p"], method="holm")[1])
        assert (family["p_holm"] > family["p"]).any()
    assert found["significant"].tolist() == (found["p_holm"] <= 0.1).tolist()
    assert ((found["p"] <= 0.1) & ~found["significant"]).any(), "a test that the correction takes back"
    assert found["significant"].any()


def test_the_spread_and_the_interval_of_a_comparison() -> None:
    table = scores()
    row = paired_tests(table, "control", alpha=0.2).set_index(["method", "task"]).loc[("a", "task 1")]
    own = table[table["task"] == "task 1"].pivot(index="seed", columns="method", values="score")
    differences = own["a"] - own["control"]
    assert row["sd"] == pytest.approx(differences.std())
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.8)
    assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])


def test_a_task_with_more_seeds_weighs_no_more_and_a_single_pair_says_nothing() -> None:
    table = pd.DataFrame(
        [("x", "a", seed, 1.0) for seed in range(9)]
        + [("x", "control", seed, 0.0) for seed in range(9)]
        + [("y", "a", 0, 0.0), ("y", "control", 0, 0.5)],
        columns=["task", "method", "seed", "score"],
    )
    found = paired_tests(table, "control").set_index("task")
    assert found.loc[ALL_TASKS, "difference"] == pytest.approx((1.0 - 0.5) / 2)
    assert np.isnan(found.loc["y", "p_holm"])
    assert np.isnan(found.loc["x", "p"]), "nine equal differences: no spread to judge by"
    assert not found["significant"].any()


def test_familywise_false_positives_stay_at_the_level_and_effects_are_found() -> None:
    """2,000 studies of noise, 8 t tests of 5 pairs each: any significant in at most 5 % + 2.5 standard errors (1.2
    points)."""
    differences = np.random.default_rng(9).normal(size=(2000, 8, 5))
    p = stats.ttest_1samp(differences, 0, axis=2).pvalue
    assert (p.min(axis=1) <= 0.05).mean() > 0.25, "uncorrected, a third of the studies would claim something"
    assert 0.03 <= np.mean([(holm(own) <= 0.05).any() for own in p]) <= 0.062
    found = paired_tests(scores(0.1), "control").set_index(["method", "task"])
    assert found.loc["a", "significant"].all()
    assert not found.loc["b", "significant"].any()


def test_paired_tests_refuse_unclear_tables() -> None:
    with pytest.raises(ArgumentError, match="control='c'"):
        paired_tests(scores(), "c")
    with pytest.raises(DataError, match="more than one row"):
        paired_tests(pd.concat([scores(), scores()]), "control")
    with pytest.raises(ArgumentError, match="no column 'seed'"):
        paired_tests(scores().drop(columns="seed"), "control")


# equivalence -------------------------------------------------------------------------------------------------------


def test_tost_is_two_one_sided_t_tests_and_its_interval_says_the_same() -> None:
    values = np.random.default_rng(5).normal(0.002, 0.01, 12)
    row = tost(values, 0.01).iloc[0]
    assert row["p_lower"] == pytest.approx(stats.ttest_1samp(values, -0.01, alternative="greater").pvalue)
    assert row["p_upper"] == pytest.approx(stats.ttest_1samp(values, 0.01, alternative="less").pvalue)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])
    for margin in (0.001, 0.005, 0.01, 0.02):
        row = tost(values, margin).iloc[0]
        assert row["equivalent"] == (-margin < row["low"] and row["high"] < margin)


def test_false_claims_of_equivalence_stay_at_the_level() -> None:
    """The true difference lies just on the margin: 1,000 studies, 5 % ± 2.5 standard errors (1.7 points)."""
    generator = np.random.default_rng(6)
    wrong = sum(tost(values, 1.0)["equivalent"].iloc[0] for values in generator.normal(1.0, 0.7, (1000, 8)))
    assert 0.033 <= wrong / 1000 <= 0.067


def test_tost_without_spread_or_with_one_value() -> None:
    assert tost([0.0, 0.0, 0.0], 0.01)["equivalent"].iloc[0]
    assert not tost([0.02, 0.02], 0.01)["equivalent"].iloc[0]
    one = tost([0.0], 0.01).iloc[0]
    assert not one["equivalent"]
    assert np.isnan(one["p"])
    with pytest.raises(ArgumentError, match="margin=0"):
        tost([0.0, 1.0], 0)


# McNemar and power -------------------------------------------------------------------------------------------------


def test_mcnemar_is_a_sign_test_on_the_rows_that_differ() -> None:
    first = np.array([1] * 12 + [0] * 3 + [1] * 20 + [0] * 5)
    second = np.array([0] * 12 + [1] * 3 + [1] * 20 + [0] * 5)
    row = mcnemar(first, second).iloc[0]
    assert (row["only_first"], row["only_second"], row["n"]) == (12, 3, 40)
    assert row["p"] == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert row["difference"] == pytest.approx(9 / 40)
    assert mcnemar(first, first)["p"].iloc[0] == 1.0
    pooled = mcnemar(np.stack([first, first]), np.stack([second, second])).iloc[0]
    assert pooled["p"] == pytest.approx(stats.binomtest(6, 30).pvalue)


def test_mcnemar_keeps_its_level() -> None:
    """Exact and discrete, so at or below 5 %; 300 pairs of equally good methods, so up to 2.5 standard errors (3.1
    points) more."""
    generator = np.random.default_rng(7)
    rows = generator.random((2, 300, 60)) < 0.7
    assert np.mean([mcnemar(a, b)["p"].iloc[0] <= 0.05 for a, b in zip(*rows, strict=True)]) <= 0.081


def test_mcnemar_wants_right_or_wrong_of_the_same_rows() -> None:
    with pytest.raises(DataError, match="besides 0 and 1"):
        mcnemar([0.3, 1.0], [1, 0])
    with pytest.raises(DataError, match="equal ones"):
        mcnemar([1, 0], [1, 0, 1])


def test_power_inverts_the_noncentral_t() -> None:
    table = power([2, 3, 5, 10, 20], sd=0.02)
    for row in table.itertuples():
        noncentrality, freedom = row.effect * np.sqrt(row.n), row.n - 1
        bound = stats.t.ppf(0.975, freedom)
        reached = stats.nct.sf(bound, freedom, noncentrality)
        if row.n > 3:  # SciPy's other tail is NaN for fewer
            reached += stats.nct.cdf(-bound, freedom, noncentrality)
        assert reached == pytest.approx(0.8, abs=1e-4)
        assert row.detectable == pytest.approx(0.02 * row.effect)
    # the customary values for five, ten and twenty seeds
    assert table["effect"].round(1).tolist()[2:] == [1.7, 1.0, 0.7]
    with pytest.raises(ArgumentError, match="n=1"):
        power(1)


def test_an_effect_of_the_detectable_size_is_found_as_often_as_promised() -> None:
    effect = power(6)["effect"].iloc[0]
    p = stats.ttest_1samp(np.random.default_rng(8).normal(effect, 1.0, (4000, 6)), 0, axis=1).pvalue
    assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.02)
