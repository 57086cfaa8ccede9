"""The metrics that tasks report, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks.metrics import check_metric

Array = NDArray[np.number]


def _pearson(scores: Array, labels: Array) -> float:
    return float(stats.pearsonr(scores, labels).statistic)


def _spearman(scores: Array, labels: Array) -> float:
    return float(stats.spearmanr(scores, labels).statistic)


_ON_CLASSES: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda predicted, labels: accuracy_score(labels, predicted),
    "f1": lambda predicted, labels: f1_score(
        labels, predicted, pos_label=1, average="binary", zero_division=0
    ),
    "macro-f1": lambda predicted, labels: f1_score(labels, predicted, average="macro", zero_division=0),
    "micro-f1": lambda predicted, labels: f1_score(labels, predicted, average="micro", zero_division=0),
    "matthews": lambda predicted, labels: matthews_corrcoef(labels, predicted),
}
_ON_SCORES: dict[str, Callable[[Array, Array], float]] = {"pearson": _pearson, "spearman": _spearman}
METRICS = (*_ON_CLASSES, *_ON_SCORES)
_CORRELATIONS = ("matthews", "pearson", "spearman")


def compute(names: Iterable[str], logits: Array, labels: Array) -> dict[str, float]:
    """The metrics `names` of `logits` [rows, classes] (or [rows, 1] for regression) against `labels` [rows].

    Natural units: accuracy and the F1 family in 0..1, correlations in -1..1. `f1` is binary with class 1
    positive, `macro-f1` and `micro-f1` average over classes. A correlation with something constant is 0, as in
    GLUE. Raises `ArgumentError` for a metric that such logits do not have (`tasks.metrics`) and `DataError` for shapes
    that do not match.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != (len(logits),) or not len(labels):
        raise DataError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape} do not fit; "
            "give [rows, classes] and [rows], with at least one row"
        )
    return {name: _one(name, logits, labels) for name in names}


def _one(name: str, logits: Array, labels: Array) -> float:
    classes = logits.shape[1]
    check_metric(name, "classification" if classes > 1 else "regression", classes)
    predicted = logits[:, 0].astype(np.float64) if name in _ON_SCORES else logits.argmax(axis=1)
    if name in _CORRELATIONS and (_constant(predicted) or _constant(labels)):
        return 0.0
    return float({**_ON_CLASSES, **_ON_SCORES}[name](predicted, labels))


def _constant(values: Array) -> bool:
    return bool(np.ptp(values) == 0)
