"""How sure a difference between two sets of predictions on the same rows is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.training import metrics

REPLICATES = 1000
LEVEL = 0.95


def paired_interval(
    metric: str,
    logits: np.ndarray,
    base: np.ndarray,
    labels: np.ndarray,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval for metric(logits) − metric(base) on the same rows. Generalises to: other rows for these two models.

    Accuracy: the adjusted Wald interval for matched proportions of Agresti and Min (2005), which holds in small samples
    and where no or all discordant rows point one way. With b rows that became right and c that became wrong,
    d = (b − c) / (n + 2) ± z √(b' + c' − (b' − c')² / (n + 2)) / (n + 2), where b' = b + ½, c' = c + ½.
    Other metrics: percentiles of a paired bootstrap over rows (1,000 draws; a rank correlation keeps its ranks);
    (nan, nan) if no prediction differs, as all draws would be 0.
    """
    if metric in ("accuracy", "micro-f1"):
        return _matched(logits.argmax(1) == labels, base.argmax(1) == labels, level)
    if metric in ("pearson", "spearman"):
        same = np.array_equal(logits, base)
    else:
        same = np.array_equal(logits.argmax(1), base.argmax(1))
    if same:
        return float("nan"), float("nan")
    n = len(labels)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), REPLICATES).astype(float)
    drawn = weighted(metric, logits, labels, weights) - weighted(metric, base, labels, weights)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _matched(now: np.ndarray, before: np.ndarray, level: float) -> tuple[float, float]:
    gained, lost = (now & ~before).sum() + 0.5, (before & ~now).sum() + 0.5
    size = len(now) + 2
    middle = (gained - lost) / size
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt(gained + lost - (gained - lost) ** 2 / size) / size
    return max(-1.0, float(middle - half)), min(1.0, float(middle + half))


def weighted(metric: str, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric with row i counted `weights[draw, i]` times, for every draw; `training.metrics` for weights of one."""
    if metric in ("pearson", "spearman"):
        values, truth = logits[:, 0].astype(float), labels.astype(float)
        if metric == "spearman":
            values, truth = stats.rankdata(values), stats.rankdata(truth)
        return _correlation(values, truth, weights)
    if metric not in _FROM_COUNTS:
        raise UnsupportedError(
            f"metric={metric!r} has no interval here; known are {', '.join(metrics.METRICS)}"
        )
    classes = max(logits.shape[1], int(labels.max()) + 1)
    cells = np.eye(classes * classes)[labels.astype(int) * classes + logits.argmax(1)]
    return _FROM_COUNTS[metric]((weights @ cells).reshape(-1, classes, classes))


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def _correlation(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    share = weights / weights.sum(1, keepdims=True)
    x, y = values - (share @ values)[:, None], truth - (share @ truth)[:, None]
    together = (share * x * y).sum(1)
    return _over(together, np.sqrt((share * x**2).sum(1) * (share * y**2).sum(1)))


# of counts [draws, true class, predicted class]


def _f1_by_class(counts: np.ndarray) -> np.ndarray:
    right = np.einsum("dcc->dc", counts)
    return _over(2 * right, counts.sum(1) + counts.sum(2))


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    present = (counts.sum(1) + counts.sum(2)) > 0  # as in scikit-learn: classes that occur or are predicted
    return _over((_f1_by_class(counts) * present).sum(1), present.sum(1).astype(float))


def _matthews(counts: np.ndarray) -> np.ndarray:
    true, predicted, rows = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    above = np.einsum("dcc->d", counts) * rows - (true * predicted).sum(1)
    below = np.sqrt((rows**2 - (predicted**2).sum(1)) * (rows**2 - (true**2).sum(1)))
    return _over(above, below)


_FROM_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1": lambda counts: _f1_by_class(counts)[:, 1],
    "macro-f1": _macro_f1,
    "matthews": _matthews,
}
