"""Metrics of resampled rows are those of scikit-learn, and the interval covers the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.studies.paired_difference import paired_interval, weighted
from hadamard_toolkit.training import metrics

NOISE = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("metric", "classes"), [("f1", 2), ("macro-f1", 3), ("matthews", 2), ("matthews", 4)]
)
def test_counts_give_the_metric_of_the_rows_drawn(metric: str, classes: int) -> None:
    logits, labels = NOISE.normal(size=(40, classes)), NOISE.integers(0, classes, 40)
    weights = NOISE.multinomial(40, np.full(40, 1 / 40), 20)
    weights[0] = 1
    for row, found in zip(weights, weighted(metric, logits, labels, weights.astype(float)), strict=True):
        drawn = np.repeat(np.arange(40), row)
        assert found == pytest.approx(
            metrics.compute([metric], logits[drawn], labels[drawn])[metric], abs=1e-12
        )


def test_correlations_of_the_rows_drawn() -> None:
    truth = NOISE.normal(size=60)
    values = (truth + NOISE.normal(size=60))[:, None]
    weights = NOISE.multinomial(60, np.full(60, 1 / 60), 10).astype(float)
    weights[0] = 1
    for row, found in zip(weights, weighted("pearson", values, truth, weights), strict=True):
        drawn = np.repeat(np.arange(60), row.astype(int))
        assert found == pytest.approx(metrics.compute(["pearson"], values[drawn], truth[drawn])["pearson"])
    whole = weighted("spearman", values, truth, weights)[0]
    assert whole == pytest.approx(metrics.compute(["spearman"], values, truth)["spearman"])


def test_accuracy_by_hand() -> None:
    """n = 10, one gained, three lost: b' = 1.5, c' = 3.5, (b' − c') / 12 = −1/6."""
    labels, base, now = np.zeros(10, int), np.zeros((10, 2)), np.zeros((10, 2))
    base[:9, 0], base[9:, 1] = 1, 1  # wrong in the last row
    now[:, 0] = 1
    now[:3] = [0, 1]
    half = 1.959963985 * np.sqrt(5 - 4 / 12) / 12
    assert paired_interval("accuracy", now, base, labels) == pytest.approx((-1 / 6 - half, -1 / 6 + half))


def test_no_change_of_accuracy_is_no_certainty() -> None:
    logits, labels = NOISE.normal(size=(256, 2)), np.zeros(256, int)
    low, high = paired_interval("accuracy", logits, logits, labels)
    assert low == pytest.approx(-high)
    assert 0.005 < high < 0.015
    assert all(np.isnan(paired_interval("f1", logits, logits, labels)))


@pytest.mark.parametrize(("metric", "least"), [("accuracy", 0.92), ("f1", 0.89), ("matthews", 0.89)])
def test_coverage(metric: str, least: float) -> None:
    """Over many samples of 150 rows, the interval holds the difference in the population about as often as it says.

    A percentile bootstrap of so few rows is known to be a little narrow.
    """
    noise = np.random.default_rng(1)
    labels = noise.integers(0, 2, 60_000)
    base = np.eye(2)[np.where(noise.random(60_000) < 0.85, labels, 1 - labels)]
    now = np.where((noise.random(60_000) < 0.1)[:, None], base[:, ::-1], base)
    whole = metrics.compute([metric], now, labels)[metric] - metrics.compute([metric], base, labels)[metric]
    inside = 0
    for sample in range(200):
        drawn = noise.integers(0, 60_000, 150)
        low, high = paired_interval(metric, now[drawn], base[drawn], labels[drawn], seed=sample)
        inside += low <= whole <= high
    assert least <= inside / 200 <= 0.985


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="metric='bleu' has no interval"):
        paired_interval("bleu", np.eye(2), 1 - np.eye(2), np.array([0, 1]))
