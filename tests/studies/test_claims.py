"""Verdicts: what is tested, what a test could have shown, and what is never said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies import Claim, claims_text, counted_claim, verdicts
from hadamard_toolkit.studies.claims import (
    BETTER,
    COUNTED,
    EQUIVALENT,
    FAILS,
    HOLDS,
    NONE,
    NOT_WORSE,
    OPEN,
    SIDES,
)


def claim(
    gains: np.ndarray | list[float], side: str = NOT_WORSE, *, seeds: int = 2, family: str = ""
) -> Claim:
    """A claim over tasks whose mean gains are `gains`; the seeds of a task lie evenly about its mean."""
    apart = np.linspace(-0.1, 0.1, seeds) if seeds > 1 else np.zeros(1)
    rows = [(f"task {t}", s, gain + apart[s]) for t, gain in enumerate(gains) for s in range(seeds)]
    pairs = pd.DataFrame(rows, columns=["task", "seed", "gain"])
    return Claim("it is so", "Somebody 2020", "A − B", "tiny, 9 rows", side, pairs, family)


def verdict(gains: list[float], side: str) -> str:
    return verdicts([claim(gains, side)])["verdict"].iloc[0]


AROUND = np.array([-1.0, 0.0, 0.5, 0.5]) / 100  # mean 0


def test_seeds_are_averaged_and_the_interval_is_over_tasks() -> None:
    values = AROUND + 0.01
    row = verdicts([claim(values)]).iloc[0]
    half = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (row["tasks"], row["seeds"]) == (4, "2")
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([0.01, 0.01 - half, 0.01 + half])


@pytest.mark.parametrize(("side", "null"), [(NOT_WORSE, -0.02), (BETTER, 0.0)])
def test_p_is_that_of_a_t_test_and_power_that_of_a_noncentral_t(side: str, null: float) -> None:
    row = verdicts([claim(AROUND, side)]).iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_1samp(AROUND, null, alternative="greater").pvalue)
    expected = stats.nct.sf(stats.t.ppf(0.95, 3), 3, 0.02 * 2 / AROUND.std(ddof=1))
    assert row["power"] == pytest.approx(expected), "both sides lie the margin away from their null"


def test_equivalence_is_both_sides_and_its_power_less_than_that_of_one() -> None:
    one, both = (verdicts([claim(AROUND, side)]).iloc[0] for side in (NOT_WORSE, EQUIVALENT))
    assert both["p"] == pytest.approx(
        max(stats.ttest_1samp(side * AROUND, -0.02, alternative="greater").pvalue for side in (1, -1))
    )
    assert both["power"] == pytest.approx(2 * one["power"] - 1)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (-0.05, {NOT_WORSE: FAILS, BETTER: FAILS, EQUIVALENT: FAILS}),
        (-0.02, {NOT_WORSE: OPEN, BETTER: FAILS, EQUIVALENT: OPEN}),
        (0.0, {NOT_WORSE: HOLDS, BETTER: FAILS, EQUIVALENT: HOLDS}),
        (0.02, {NOT_WORSE: HOLDS, BETTER: HOLDS, EQUIVALENT: OPEN}),
        (0.05, {NOT_WORSE: HOLDS, BETTER: HOLDS, EQUIVALENT: FAILS}),
    ],
)
def test_what_is_said_where_the_spread_is_small(mean: float, expected: dict[str, str]) -> None:
    assert {side: verdict(list(mean + AROUND / 2), side) for side in SIDES} == expected


def test_without_power_nothing_is_denied_and_what_came_out_stays() -> None:
    wide = 10 * AROUND
    table = verdicts([claim(wide - 0.5), claim(wide, BETTER), claim(wide + 0.5, BETTER)])
    assert (table["power"] < 0.5).all()
    assert table["verdict"].tolist() == [OPEN, OPEN, HOLDS]
    assert verdicts([claim(wide - 0.5)], least_power=0.05)["verdict"].tolist() == [FAILS]


def test_one_task_and_no_run_are_no_test() -> None:
    nothing = Claim("it is so", "Somebody 2020", "A − B", "tiny", BETTER, pd.DataFrame())
    table = verdicts([claim([0.3]), nothing, claim(AROUND + 0.02)])
    assert table["verdict"].tolist() == [OPEN, NONE, HOLDS]
    assert table[["p", "power"]].isna().all(axis=1).tolist() == [True, True, False]
    assert table["tasks"].tolist() == [1, 0, 4]
    assert table["p"].iloc[2] == table["p_holm"].iloc[2], "what cannot be tested does not count"


def test_claims_are_corrected_within_their_family_and_power_is_at_its_level() -> None:
    same = [claim(AROUND, family="a"), claim(AROUND, family="a"), claim(AROUND, family="b")]
    table = verdicts(same)
    p = table["p"].iloc[0]
    assert table["p_holm"].tolist() == pytest.approx([2 * p, 2 * p, p])
    strict = stats.nct.sf(stats.t.ppf(0.975, 3), 3, 0.02 * 2 / AROUND.std(ddof=1))
    assert table["power"].iloc[0] == pytest.approx(strict)
    assert table["power"].iloc[2] > strict


def test_the_contrary_is_corrected_too() -> None:
    lost = claim(-0.033 + AROUND)
    assert verdicts([lost])["verdict"].tolist() == [FAILS]
    p = stats.ttest_1samp(-0.013 + AROUND, 0, alternative="less").pvalue
    assert 0.05 / 4 < p < 0.05
    assert verdicts([lost, *[claim(AROUND) for _ in range(3)]], least_power=0.01)["verdict"].iloc[0] == OPEN


def simulated(mean: float, side: str, *, families: int, sd: float = 0.015, size: int = 8) -> pd.DataFrame:
    """`size` independent claims per family over 6 tasks; `family` numbers the replicates."""
    generator = np.random.default_rng([families, SIDES.index(side)])
    return pd.concat(
        [
            verdicts(
                [claim(mean + sd * generator.normal(size=6), side, seeds=1) for _ in range(size)]
            ).assign(family=f)
            for f in range(families)
        ]
    )


@pytest.mark.parametrize(("side", "null"), [(NOT_WORSE, -0.02), (BETTER, 0.0)])
def test_simulated_claims_at_the_border_seldom_hold(side: str, null: float) -> None:
    table = simulated(null, side, families=20)
    assert table.assign(wrong=table["verdict"] == HOLDS).groupby("family")["wrong"].any().mean() <= 0.15


@pytest.mark.parametrize(("side", "truth"), [(NOT_WORSE, -0.02), (BETTER, 0.02)])
def test_simulated_true_claims_are_seldom_denied(side: str, truth: float) -> None:
    """At the least difference for which the claim, or a gain of the margin, is true."""
    table = simulated(truth, side, families=20, sd=0.005)
    assert table.assign(wrong=table["verdict"] == FAILS).groupby("family")["wrong"].any().mean() <= 0.15


@pytest.mark.parametrize(("side", "truth"), [(NOT_WORSE, 0.0), (BETTER, 0.02)])
def test_simulated_claims_come_out_as_often_as_their_power_says(side: str, truth: float) -> None:
    alone = simulated(truth, side, families=60, size=1)
    assert 0.5 < alone["power"].mean() < 0.95
    assert (alone["verdict"] == HOLDS).mean() == pytest.approx(alone["power"].mean(), abs=0.12)
    corrected = simulated(truth, side, families=8, sd=0.008)
    assert (corrected["verdict"] == HOLDS).mean() > corrected["power"].mean() - 0.05


@pytest.mark.parametrize(
    ("counted", "holds"),
    [(0.000337, True), (0.000326, True), (0.000324, False), (0.00034, False), (0.00029, False)],
)
def test_a_counted_share_may_be_rounded_or_cut_off(counted: float, holds: bool) -> None:
    row = counted_claim("0.033 %", "S", "1 of 3", "BERT", counted=counted, claimed=0.00033).iloc[0]
    assert row["verdict"] == (HOLDS if holds else FAILS)
    assert row["side"] == COUNTED


def test_the_table_as_text() -> None:
    nothing = Claim("no run", "Somebody 2020", "A − B", "tiny", BETTER, pd.DataFrame())
    table = verdicts([claim(AROUND), claim([0.3], BETTER, seeds=1), nothing])
    share = counted_claim("0.033 %", "S", "1 of 3", "BERT", counted=0.000337, claimed=0.00033)
    shown = claims_text(pd.concat([table, share], ignore_index=True)).reset_index()
    assert shown["difference"].tolist() == ["+0.0 [-1.1, +1.1]", "+30.0", "–", "0.0337 %"]
    assert shown["tested"].tolist() == ["> −2", "> 0", "> 0", "–"]
    assert shown["scale"].tolist() == [
        "tiny, 9 rows, 4 tasks, 2 seeds",
        "tiny, 9 rows, 1 task, 1 seed",
        "tiny",
        "BERT",
    ]
    assert shown["p (Holm)"].tolist() == [f"{table['p'].iloc[0]:.3f}", "–", "–", "–"]
    assert shown["power"].tolist()[1:] == ["–", "–", "–"]
    small = claims_text(verdicts([claim(AROUND + 0.5)]))
    assert small["p (Holm)"].tolist() == ["< 0.001"]


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ArgumentError, match="side='worse'"):
        verdicts([claim(AROUND, "worse")])
    with pytest.raises(ArgumentError, match="margin"):
        verdicts([claim(AROUND)], margin=0)
    pairs = claim(AROUND).differences
    with pytest.raises(ArgumentError, match="no column 'gain'"):
        verdicts([Claim("", "", "", "", BETTER, pairs.drop(columns="gain"))])
    with pytest.raises(DataError, match="no common unit"):
        verdicts([Claim("", "", "", "", BETTER, pairs.assign(metric=["accuracy", "matthews"] * 4))])
