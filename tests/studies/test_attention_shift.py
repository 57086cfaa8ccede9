"""Planted shifts are found, noise is not, and fits are judged by what they have not seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.attention_shift import (
    cka_biased,
    cka_debiased,
    cka_summary,
    fit_summary,
    means_by_example,
    norm_shift,
    norms_by_example,
    polynomial_fits,
    shift_counts,
    shift_text,
)

EXAMPLES, TOKENS, WIDTH = 40, 6, 16
GROUP = np.repeat(np.arange(EXAMPLES), TOKENS)
HALF = np.arange(EXAMPLES // 2)


def outputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(EXAMPLES * TOKENS, WIDTH))


def test_norms_and_means_by_example() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    example = np.array([0, 0, 1])
    np.testing.assert_allclose(norms_by_example(rows, example), [3, 10])
    np.testing.assert_allclose(means_by_example(rows, example), [[1.5, 2.5], [6, 8]])
    with pytest.raises(DataError, match="one example per row"):
        norms_by_example(rows, example[:2])


def shifts(change: float, *, noise: float = 0.1, seeds: int = 2, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rows = []
    for layer in range(2):
        before = generator.normal(5, 1, size=EXAMPLES)
        for run in range(seeds):
            after = before + change * layer + generator.normal(0, noise, EXAMPLES)
            rows += [("t", "m", layer, run, i, before[i], after[i]) for i in range(EXAMPLES)]
    return pd.DataFrame(rows, columns=["task", "method", "layer", "seed", "example", "before", "after"])


def test_a_planted_shift_is_found_where_it_is() -> None:
    table = norm_shift(shifts(0.5, seeds=3)).set_index("layer")
    assert 0.4 < table.loc[1, "low"] < table.loc[1, "high"] < 0.6
    assert table.loc[0, "low"] < 0 < table.loc[0, "high"]
    assert table.loc[1, "percent"] == pytest.approx(10, abs=2)
    assert table[["n_examples", "n_seeds"]].values.tolist() == [[EXAMPLES, 3]] * 2
    rows = shifts(0.5, seeds=3)
    for layer in (0, 1):
        own = rows[rows["layer"] == layer]
        assert table.loc[layer, "before"] == pytest.approx(own["before"].mean())
        assert table.loc[layer, "after"] == pytest.approx(own["after"].mean())
        assert table.loc[layer, "difference"] == pytest.approx((own["after"] - own["before"]).mean())


def test_no_training_is_no_shift_at_all() -> None:
    still = norm_shift(shifts(0, noise=0))
    assert (still[["difference", "low", "high", "percent"]] == 0).all(axis=None)


def test_noise_is_called_a_shift_no_more_often_than_the_level_says() -> None:
    """Pairing matters: examples differ ten times as much as before and after do."""
    wrong = [
        not row["low"] <= 0 <= row["high"]
        for seed in range(150)
        for _, row in norm_shift(shifts(0, seed=seed, seeds=1), draws=400).iterrows()
    ]
    assert np.mean(wrong) < 0.09


def crossed(
    seeds: int, apart: float, replicates: int, *, change: float = 0.0, examples: int = EXAMPLES, seed: int = 0
) -> pd.DataFrame:
    """One replicate per layer: the change of a seed differs from the next by `apart` of the spread between examples."""
    generator = np.random.default_rng([seeds, round(100 * apart), seed])
    parts = []
    for layer in range(replicates):
        of_seed, of_example, own = (
            generator.normal(size=shape) for shape in ((seeds, 1), (1, examples), (seeds, examples))
        )
        changes = change + apart * of_seed + of_example + 0.3 * own
        run, example = (axis.ravel() for axis in np.indices(changes.shape))
        told = {"layer": layer, "seed": run, "example": example, "before": 5.0, "after": 5 + changes.ravel()}
        parts.append(pd.DataFrame(told))
    return pd.concat(parts, ignore_index=True).assign(task="t", method="m")


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0])
def test_simulated_seeds_that_differ_are_no_shift(seeds: int, apart: float) -> None:
    table = norm_shift(crossed(seeds, apart, 300), draws=20)
    star = (table["low"] > 0) | (table["high"] < 0)
    assert star.mean() <= 0.07
    assert set(table["holds_for"]) == {"other seeds and examples"}


def test_simulated_shifts_are_covered_and_found_with_three_seeds() -> None:
    table = norm_shift(crossed(3, 0.5, 300, change=3.0), draws=20)
    assert ((table["low"] <= 3) & (table["high"] >= 3)).mean() >= 0.93
    assert (table["low"] > 0).mean() >= 0.95


def test_the_claim_for_these_models_alone_is_beside_it() -> None:
    """Seeds by themselves: each was shifted, though other seeds might not be."""
    table = norm_shift(crossed(2, 1.0, 200, seed=3), draws=300)
    narrow = table["here_high"] - table["here_low"]
    assert (narrow < 0.5 * (table["high"] - table["low"])).mean() > 0.9
    means = crossed(2, 1.0, 200, seed=3).groupby("layer")["after"].mean() - 5
    np.testing.assert_allclose(table["difference"], means)
    assert (table["here_low"] <= table["difference"]).all()
    alone = norm_shift(shifts(0.5, seeds=1))
    assert set(alone["holds_for"]) == {"this seed, other examples"}
    assert alone[["low", "high"]].equals(alone[["here_low", "here_high"]].set_axis(["low", "high"], axis=1))


def test_seeds_must_share_their_examples() -> None:
    table = shifts(0.5)
    with pytest.raises(DataError, match="different examples"):
        norm_shift(table.drop(index=table.index[-1]))
    with pytest.raises(ArgumentError, match="'before'"):
        norm_shift(table.drop(columns="before"))


def test_debiased_cka_of_independent_data_is_zero_where_the_biased_one_is_not() -> None:
    generator = np.random.default_rng(0)
    pairs = [(generator.normal(size=(30, 200)), generator.normal(size=(30, 200))) for _ in range(40)]
    debiased = np.array([cka_debiased(*pair) for pair in pairs])
    biased = np.array([cka_biased(*pair) for pair in pairs])
    assert abs(debiased.mean()) < 3 * debiased.std() / np.sqrt(len(pairs))
    assert biased.min() > 0.8


def test_cka_is_one_for_the_same_up_to_rotation_scale_and_shift() -> None:
    generator = np.random.default_rng(1)
    one = generator.normal(size=(30, 12))
    rotation = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    for measure in (cka_debiased, cka_biased):
        assert measure(one, 3 * one @ rotation + 5) == pytest.approx(1)
    assert 0.3 < cka_debiased(one, one + 1.0 * generator.normal(size=one.shape)) < 0.9


def test_debiased_hsic_is_the_formula() -> None:
    """By brute force over all quadruples of different rows (Song et al. 2012, equation 4)."""
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(6, 3)), generator.normal(size=(6, 4))
    y[:, 0] += x[:, 0]

    def by_hand(a: np.ndarray, b: np.ndarray) -> float:
        k, m, n = a @ a.T, b @ b.T, len(a)
        terms = [
            k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]
            for i in range(n)
            for j in range(n)
            for q in range(n)
            for r in range(n)
            if len({i, j, q, r}) == 4
        ]
        return float(np.mean(terms))

    expected = by_hand(x, y) / np.sqrt(by_hand(x, x) * by_hand(y, y))
    assert cka_debiased(x, y) == pytest.approx(expected)


def test_cka_says_what_it_cannot_do() -> None:
    with pytest.raises(DataError, match="n=3"):
        cka_debiased(np.eye(3), np.eye(3))
    with pytest.raises(DataError, match="paired"):
        cka_debiased(np.eye(5), np.eye(6))
    assert np.isnan(cka_debiased(np.ones((6, 2)), np.eye(6)))


def fitted(after: np.ndarray, before: np.ndarray) -> pd.DataFrame:
    table = polynomial_fits(before, after, GROUP, HALF).assign(task="t", method="m", seed=0, layer=0)
    return fit_summary(table, draws=500).set_index("fit")


def test_a_linear_map_needs_no_more_than_a_line() -> None:
    before = outputs()
    generator = np.random.default_rng(5)
    scale, shift = generator.uniform(0.5, 2, WIDTH), generator.normal(size=WIDTH)
    after = scale * before + shift + 0.3 * generator.normal(size=before.shape)
    table = fitted(after, before)
    assert table.loc["linear", "r2"] > 0.8 > table.loc["unchanged", "r2"]
    assert table.loc["linear", "gain_low"] > 0
    assert table.loc["cubic", "r2"] < table.loc["linear", "r2"], "on held-out examples more degrees cost"
    assert table.loc["quadratic", "gain_low"] < 0.002
    assert set(table["n_examples"]) == {EXAMPLES // 2}
    exact = fitted(scale * before + shift, before)
    assert exact.loc["linear", "r2"] == pytest.approx(1)


@pytest.mark.parametrize(("power", "fit"), [(2, "quadratic"), (3, "cubic")])
def test_a_planted_curve_is_recovered(power: int, fit: str) -> None:
    before = outputs()
    after = before + 0.5 * before**power + 0.3 * np.random.default_rng(6).normal(size=before.shape)
    table = fitted(after, before)
    assert table.loc[fit, "r2"] > 0.85
    assert table.loc[fit, "gain_low"] > 0.02
    if fit == "quadratic":
        assert table.loc["cubic", "gain_low"] < 0.002


def test_an_unchanged_layer_is_fitted_by_itself() -> None:
    before = outputs()
    table = fitted(before, before)
    assert table.loc["unchanged", "r2"] == 1
    assert table.loc["linear", "r2"] == pytest.approx(1)


def test_in_noise_no_degree_gains_more_often_than_the_level_says() -> None:
    wrong, draws = {"quadratic": 0, "cubic": 0}, 100
    for seed in range(draws):
        generator = np.random.default_rng([7, seed])
        before, after = (generator.normal(size=(EXAMPLES * TOKENS, 2)) for _ in range(2))
        table = fitted(after, before)
        for fit in wrong:
            wrong[fit] += table.loc[fit, "gain_low"] > 0
    assert all(count / draws <= 0.05 for count in wrong.values()), wrong


def test_r2_is_the_mean_over_coordinates_of_scikit_learns_formula() -> None:
    before = outputs()
    after = before**2 * np.arange(1, WIDTH + 1) + outputs(1)
    held = ~np.isin(GROUP, HALF)
    expected = []
    for j in range(WIDTH):
        line = np.polynomial.Polynomial.fit(before[~held, j], after[~held, j], 2)
        y = after[held, j]
        expected.append(1 - ((y - line(before[held, j])) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert fitted(after, before).loc["quadratic", "r2"] == pytest.approx(np.mean(expected))


def test_intervals_of_fits_come_from_drawing_examples() -> None:
    before = outputs()
    after = before + 0.2 * before**2 + 0.3 * np.random.default_rng(8).normal(size=before.shape)
    table = polynomial_fits(before, after, GROUP, HALF).assign(task="t", method="m", seed=0, layer=0)
    found = fit_summary(table, draws=300, level=0.8, seed=2).set_index("fit")
    count = EXAMPLES // 2
    drawn = np.random.default_rng(2).multinomial(count, np.full(count, 1 / count), 300)
    total, linear, unchanged = (drawn @ table[name].to_numpy() for name in ("total", "linear", "unchanged"))
    for columns, values in (
        (["low", "high"], 1 - linear / total),
        (["gain_low", "gain_high"], (unchanged - linear) / total),
    ):
        assert found.loc["linear", columns].tolist() == pytest.approx(
            np.quantile(values, [0.1, 0.9]).tolist()
        )


def test_outputs_that_do_not_vary_have_nothing_to_explain() -> None:
    same = np.ones_like(outputs())
    table = polynomial_fits(outputs(), same, GROUP, HALF)
    assert len(table) == EXAMPLES // 2
    assert (table.drop(columns="example") == 0).all(axis=None)


def test_fits_need_both_halves() -> None:
    with pytest.raises(ArgumentError, match="leave some out"):
        polynomial_fits(outputs(), outputs(), GROUP, np.arange(EXAMPLES))
    with pytest.raises(DataError, match="paired"):
        polynomial_fits(outputs(), outputs()[:, :3], GROUP, HALF)


def test_similarity_is_averaged_over_seeds_with_its_ceiling() -> None:
    rows = [
        ("t", "m", seed, 0, 0.5 + 0.2 * seed, 0.9, ceiling)
        for seed, ceiling in ((0, 0.8), (1, 0.8))
        for _ in range(3)
    ]
    columns = ["task", "method", "seed", "layer", "cka", "cka_biased", "cka_seeds"]
    [row] = cka_summary(pd.DataFrame(rows, columns=columns)).to_dict("records")
    assert (row["cka"], row["low"], row["high"]) == pytest.approx((0.6, 0.5, 0.7))
    assert (row["cka_seeds"], row["n_seeds"]) == (pytest.approx(0.8), 2)
    assert row["cka_biased"] == pytest.approx(0.9)


SHIFT = pd.DataFrame(
    [
        ("b", "x", 0, 5.4, 1, 2, 1, 2),
        ("b", "x", 1, -30.0, -2, 1, -3, -1),
        ("b", "y", 0, 2.0, -1, 1, -1, 1),
        ("b", "y", 1, -1.0, -2, -1, -2, -1),
        ("a", "x", 0, 0.0, 0, 0, 0, 0),
        ("a", "x", 1, 9.0, -1, 20, 1, 17),
    ],
    columns=["method", "task", "layer", "percent", "low", "high", "here_low", "here_high"],
)


def test_shifts_in_words_are_marked_where_they_are_clear() -> None:
    table = shift_text(SHIFT)
    assert table.loc[("b", "x")].tolist() == ["+5 % *", "-30 % °"]
    assert table.loc[("b", "y")].tolist() == ["+2 %", "-1 % *"]
    assert table.loc[("a", "x")].tolist() == ["+0 %", "+9 % °"]


def test_shifts_are_counted_by_method() -> None:
    table = shift_counts(SHIFT)
    assert table.loc["b"].to_dict() == {
        **{"cells": 4, "grows": 1, "falls": 1, "grows_here": 1, "falls_here": 2},
        **{"most": -30.0, "task": "x", "layer": 1},
    }
    assert table.loc["a", ["grows", "grows_here", "most"]].tolist() == [0, 1, 9.0]


COLUMNS = ("task", "method", "layer", "seed")


@pytest.mark.parametrize(
    ("summary", "columns"),
    [
        (norm_shift, (*COLUMNS, "example", "before", "after")),
        (fit_summary, (*COLUMNS, "example", "total", "unchanged", "linear", "quadratic", "cubic")),
        (cka_summary, (*COLUMNS, "cka", "cka_biased", "cka_seeds")),
    ],
)
def test_a_table_without_a_column_is_refused_by_its_name(
    summary: Callable[[pd.DataFrame], pd.DataFrame], columns: tuple[str, ...]
) -> None:
    table = pd.DataFrame({name: [0] for name in columns})
    for name in columns:
        with pytest.raises(ArgumentError, match=f"no column '{name}'"):
            summary(table.drop(columns=name))
