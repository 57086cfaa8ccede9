from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.training.evaluation import score
from hadamard_toolkit.training.metrics import METRICS, compute


def logits_of(classes: list[int], width: int = 2) -> np.ndarray:
    return np.eye(width)[classes]


def test_hand_worked_binary_case() -> None:
    # true positives 2, false positives 1, false negatives 1, true negatives 1
    found = compute(
        ["accuracy", "f1", "macro-f1", "matthews"], logits_of([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    )
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["macro-f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


def test_micro_f1_of_single_labels_is_accuracy() -> None:
    labels = np.array([0, 1, 2, 2])
    found = compute(["micro-f1", "accuracy"], logits_of([0, 2, 2, 1], 3), labels)
    assert found["micro-f1"] == pytest.approx(found["accuracy"]) == 0.5


def test_correlations_of_a_monotone_curve() -> None:
    labels = np.arange(6.0)
    found = compute(["pearson", "spearman"], np.exp(labels)[:, None], labels)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 0.9


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
def test_constant_predictions_score_zero_without_a_warning(name: str) -> None:
    logits = np.ones((4, 1)) if name in ("pearson", "spearman") else logits_of([0, 0, 0, 0])
    assert compute([name], logits, np.array([0, 1, 0, 1])) == {name: 0.0}


def test_metrics_come_in_the_order_asked_for() -> None:
    assert list(compute(METRICS[:4], logits_of([0, 1]), np.array([0, 1]))) == list(METRICS[:4])


def test_unknown_metric_and_wrong_shapes_are_named() -> None:
    with pytest.raises(ArgumentError, match="metric='bleu'"):
        compute(["bleu"], logits_of([0]), np.array([0]))
    with pytest.raises(DataError, match=r"\(2, 2\).*\(3,\)"):
        compute(["accuracy"], logits_of([0, 1]), np.zeros(3))
    with pytest.raises(DataError, match="at least one row"):
        compute(["accuracy"], np.zeros((0, 2)), np.zeros(0))


def test_the_loss_beside_the_metrics_is_cross_entropy_or_the_squared_error() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], np.float32)
    found = score(("accuracy",), logits, np.array([0, 1, 1]))
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(probability[[0, 1, 2], [0, 1, 1]]).mean())
    assert found["accuracy"] == pytest.approx(2 / 3)
    rated = score(
        ("pearson",), np.array([[1.0], [2.0], [5.0]], np.float32), np.array([1.0, 1.0, 2.0], np.float32)
    )
    assert rated["loss"] == pytest.approx((0 + 1 + 9) / 3)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_over_classes_of_unequal_size(average: str) -> None:
    labels, predicted = np.array([0, 0, 0, 0, 1, 2]), [0, 0, 1, 0, 1, 1]
    name = f"{average}-f1"
    expected = f1_score(labels, predicted, average=average, zero_division=0)
    assert compute([name], logits_of(predicted, 3), labels)[name] == pytest.approx(expected)


def test_spearman_reads_ranks_and_pearson_values() -> None:
    labels, scores = np.array([1.0, 2.0, 3.0, 10.0]), np.array([[1.0], [2.0], [9.0], [8.0]])
    found = compute(["pearson", "spearman"], scores, labels)
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], labels)[0, 1])
