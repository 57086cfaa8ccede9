"""Scores that cannot rank are refused, with the cause and the cure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.sparsity.scores import SCORERS

SHOWN = 4  # names in a message


class DegenerateScores(ArgumentError):
    """All entries of a tensor have the same score: a mask would follow their order, not the scorer."""


def check_finite(scorer: str, scores: Mapping[str, Tensor]) -> None:
    """Raise `DataError` for scores that are NaN or infinite."""
    if bad := [name for name, score in scores.items() if not torch.isfinite(score).all()]:
        raise DataError(
            f"scorer={scorer!r} gives scores that are not finite for {_some(bad)}; look at these weights"
        )


def check_rank(scorer: str, scores: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raise `DegenerateScores` for tensors of several entries whose scores are all the same."""
    if SCORERS[scorer].blind:
        return
    tied = [name for name, score in scores.items() if score.numel() > 1 and score.min() == score.max()]
    if not tied:
        return
    zero = [name for name in values if values[name].numel() and not values[name].any()]
    raise DegenerateScores(
        f"scorer={scorer!r} gives all entries of {_some(tied)} the same score, so they cannot be ranked. "
        + _cause_and_cure(scorer, scores, tied, zero)
    )


def _cause_and_cure(scorer: str, scores: Mapping[str, Tensor], tied: list[str], zero: list[str]) -> str:
    if zero:
        return (
            f"Cause: zero-initialised {_some(zero)}, where θ = 0 and behind which gradients vanish. Cure: attach the "
            'adapter with init="normal", or score after a warm-up (warmup_steps=10)'
        )
    if any(scores[name].any() for name in tied):
        return (
            "Cause: the weights themselves are all equal, as vectors that begin as the identity are. Cure: score "
            "after a warm-up (warmup_steps=10), or choose scorer='random'"
        )
    if scorer == "synflow":
        return (
            "Cause: an all-ones input does not get through: a LayerNorm in front turns a constant input into zero. "
            "Cure: choose another scorer"
        )
    return (
        "Cause: the loss does not depend on them, so their gradient is zero: what follows them is zero, or a narrow "
        "ReLU bottleneck is off on all examples. Cure: other or more examples, or score after a warm-up "
        "(warmup_steps=10)"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
