"""Masks that like the same rows and columns share entries for that reason alone; the null of margins knows it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

import hadamard_toolkit as ht
from hadamard_toolkit.sparsity.controls import control
from hadamard_toolkit.studies.margins import margin_chances, margin_moments
from hadamard_toolkit.studies.mask_statistics import overlap

Mask = dict[str, np.ndarray]
SHAPES = {"down": (12, 80), "up": (80, 12)}


def even(generator: np.random.Generator, chances: Mask) -> Mask:
    """Every entry by itself, with its chance."""
    return {name: generator.random(chance.shape) < chance for name, chance in chances.items()}


def favours(generator: np.random.Generator, strength: float) -> Mask:
    """Chances of a fifth on the whole, in which units and hidden coordinates differ."""
    return {
        name: expit(strength * (generator.normal(size=(shape[0], 1)) + generator.normal(size=shape[1])) - 1.5)
        for name, shape in SHAPES.items()
    }


def pairs_alike_in_margins_alone(replicates: int, *, strength: float = 1.0) -> Iterator[dict[str, float]]:
    """Overlap of two masks that are drawn apart from common chances of rows and columns."""
    for replicate in range(replicates):
        generator = np.random.default_rng([0, replicate])
        chances = favours(generator, strength)
        yield overlap(even(generator, chances), even(generator, chances))


def planted_pairs(
    share: float, replicates: int, densities: tuple[float, ...] = (0.02, 0.1, 0.3, 0.4), size: int = 4096
) -> Iterator[dict[str, float]]:
    """Overlap of two masks of which `share` of the entries are the same for a reason; all others are drawn evenly."""
    for replicate in range(replicates):
        generator = np.random.default_rng([1, replicate])
        masks: tuple[Mask, Mask] = ({}, {})
        for place, density in enumerate(densities):
            kept = round(density * size)
            common = round(share * kept)
            order = generator.permutation(size)
            for mask in masks:
                flat = np.zeros(size, bool)
                flat[order[:common]] = True
                flat[generator.choice(order[common:], kept - common, replace=False)] = True
                mask[str(place)] = flat.reshape(64, -1)
        yield overlap(*masks)


def rate(found: pd.DataFrame, null: str = "", level: float = 0.05) -> float:
    return float((found[f"{null}p"] <= level).mean())


def test_simulated_masks_alike_in_margins_alone_are_alike_under_the_null_of_densities_only() -> None:
    found = pd.DataFrame(pairs_alike_in_margins_alone(300))
    assert rate(found) == 1.0, "that is what the first null cannot tell apart"
    assert found["corrected"].mean() > 0.05
    assert rate(found, "margin_") <= 0.07
    assert abs(found["margin_corrected"].mean()) < 0.004
    outside = (found["margin_corrected"] < found["margin_low"]) | (
        found["margin_corrected"] > found["margin_high"]
    )
    assert 0.02 <= outside.mean() <= 0.07


def test_simulated_masks_that_share_weights_are_alike_under_both_nulls() -> None:
    found = pd.DataFrame(planted_pairs(0.05, 40))
    assert rate(found) == rate(found, "margin_") == 1.0
    nothing = pd.DataFrame(planted_pairs(0.0, 200))
    assert rate(nothing) <= 0.07
    assert rate(nothing, "margin_") <= 0.07


@pytest.mark.parametrize(("share", "corrected"), [(0.05, 0.022), (0.2, 0.093), (0.5, 0.292), (0.9, 0.785)])
def test_what_is_corrected_is_not_the_share_that_was_planted(share: float, corrected: float) -> None:
    found = pd.DataFrame(planted_pairs(share, 20))
    assert found["corrected"].mean() == pytest.approx(corrected, abs=0.003)
    assert found["margin_corrected"].mean() == pytest.approx(corrected, abs=0.006)


def test_the_null_of_margins_is_the_law_of_masks_shuffled_within_them() -> None:
    generator = np.random.default_rng(2)
    chances = favours(generator, 1.5)
    first, second = even(generator, chances), even(generator, chances)
    first["vector"], second["vector"] = (generator.random(50) < 0.4 for _ in range(2))
    first["deep"], second["deep"] = (generator.random((6, 5, 4)) < 0.4 for _ in range(2))
    expected = overlap(first, second)

    def shuffled(mask: Mask, seed: int) -> Mask:
        tensors = {name: torch.from_numpy(kept) for name, kept in mask.items()}
        masks = ht.Masks(tensors, dict.fromkeys(tensors), {"init_seed": 0})  # type: ignore[arg-type]
        return control(masks, "margins", seed).arrays()

    drawn = pd.DataFrame(
        [overlap(shuffled(first, seed), shuffled(second, 1000 + seed)) for seed in range(200)]
    )
    error = drawn["jaccard"].std() / np.sqrt(len(drawn))
    assert expected["margin_expected"] == pytest.approx(drawn["jaccard"].mean(), abs=3.5 * error)
    reach = (expected["margin_high"] - expected["margin_low"]) * (1 - expected["margin_expected"]) / 2
    assert reach == pytest.approx(1.96 * drawn["jaccard"].std(), rel=0.15)
    one, other = drawn["margin_expected"].min(), drawn["margin_expected"].max()
    assert one == pytest.approx(other), "margins are all that the null reads"


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (15, 4, 3), (30,)])
def test_chances_have_the_margins_of_the_mask(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    mask = generator.random(shape) < 0.3 + 0.4 * generator.random(shape[-1])
    mask[0] = False
    chances = margin_chances(mask)
    assert chances.shape == mask.shape
    flat, kept = (each.reshape(len(mask), -1) if mask.ndim > 1 else each[None] for each in (chances, mask))
    np.testing.assert_allclose(flat.sum(axis=1), kept.sum(axis=1), atol=1e-6)
    if mask.ndim > 1:
        np.testing.assert_allclose(flat.sum(axis=0), kept.sum(axis=0), atol=1e-6)
        odds = np.log(flat[1:] / (1 - flat[1:]))
        additive = odds.mean(axis=0) + odds.mean(axis=1, keepdims=True) - odds.mean()
        np.testing.assert_allclose(odds, additive, atol=1e-6)


def test_margins_that_leave_no_choice_have_no_overlap_beyond_chance() -> None:
    steps = np.tri(6, 8, dtype=bool)  # each row within the next: the only mask with these sums
    np.testing.assert_array_equal(margin_chances(steps), steps)
    assert margin_moments(margin_chances(steps), margin_chances(steps)) == (steps.sum(), 0.0)
    found = overlap({"w": steps}, {"w": steps})
    assert np.isnan([found["margin_corrected"], found["margin_p"], found["margin_low"]]).all()
    assert found["corrected"] == 1
    for mask in (np.zeros((4, 5), bool), np.ones((4, 5), bool)):
        np.testing.assert_array_equal(margin_chances(mask), mask)


def test_for_a_vector_both_nulls_are_one() -> None:
    generator = np.random.default_rng(5)
    first, second = ({"b": generator.random(200) < 0.3} for _ in range(2))
    found = overlap(first, second)
    for name in ("expected", "corrected", "low", "high", "p"):
        assert found[name] == pytest.approx(found[f"margin_{name}"])
