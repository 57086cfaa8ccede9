"""The long version of the simulations of norm_shift, similarity, Mantel's test and overlap: what docstrings quote.

pytest -m benchmark tests/benchmarks/test_simulations_of_vectors_and_masks.py -s [-k overlap]
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.studies.attention_shift import norm_shift
from hadamard_toolkit.studies.similarity import similarity_contrast
from tests.studies.test_attention_shift import crossed
from tests.studies.test_kinship import mantel_tests, tasks_in_layers
from tests.studies.test_margins import pairs_alike_in_margins_alone, planted_pairs, rate
from tests.studies.test_similarity import similar_tasks

pytestmark = pytest.mark.benchmark


def told(what: str, found: float) -> float:
    print(f"\n{what}: {found:.3f}")
    return float(found)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_norm_shift(seeds: int) -> None:
    for apart in (0.0, 0.1, 0.2, 0.5, 1.0):
        table = norm_shift(crossed(seeds, apart, 2000, seed=1), draws=2)
        false = ((table["low"] > 0) | (table["high"] < 0)).mean()
        assert told(f"false stars, {seeds} seeds {apart} of the spread apart", false) <= 0.06
    for change in (2.0, 3.0, 6.0):
        table = norm_shift(crossed(seeds, 0.5, 1000, change=change, seed=2), draws=2)
        told(f"found, {seeds} seeds, {change / 0.5:.0f} deviations of a seed", (table["low"] > 0).mean())
        covered = ((table["low"] <= change) & (table["high"] >= change)).mean()
        assert told(f"covered, {seeds} seeds", covered) >= 0.94


@pytest.mark.parametrize("tasks", [4, 5, 8])
def test_similarity_contrast(tasks: int) -> None:
    found = similarity_contrast(similar_tasks(np.random.default_rng([9, tasks]), tasks, 3000))
    for quantity, truth in {"between": 0.25, "within": 0.6, "gap": 0.35}.items():
        rows = found[found["quantity"] == quantity]
        covered = ((rows["low"] <= truth) & (rows["high"] >= truth)).mean()
        assert told(f"{quantity} covered, {tasks} tasks", covered) >= 0.93


def test_mantel() -> None:
    noise, freed = (
        np.mean([mantel_tests(tasks_in_layers(200, kinship=0.0, seed=s), value) <= 0.05 for s in range(1, 6)])
        for value in ("value", "disattenuated")
    )
    told("rejected without kinship, raw", float(noise))
    assert told("rejected without kinship, disattenuated", float(freed)) <= 0.06
    for kinship in (0.1, 0.2):
        found = mantel_tests(tasks_in_layers(200, kinship=kinship, seed=9), "disattenuated") <= 0.05
        told(f"found, kinship {kinship} of the variance", found.mean())


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_overlap_of_masks_alike_in_margins_alone(strength: float) -> None:
    found = pd.DataFrame(pairs_alike_in_margins_alone(5000, strength=strength))
    told(f"rejected given densities, favours of {strength}", rate(found))
    assert told(f"rejected given margins, favours of {strength}", rate(found, "margin_")) <= 0.07


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2, 0.5, 0.9])
def test_overlap_of_planted_pairs(share: float) -> None:
    found = pd.DataFrame(planted_pairs(share, 1000 if share < 0.05 else 100))
    told(f"corrected, {share} planted", found["corrected"].mean())
    told(f"rejected given densities, {share} planted", rate(found))
    rejected = told(f"rejected given margins, {share} planted", rate(found, "margin_"))
    assert share or rejected <= 0.07
