"""Scores that cannot rank entries are refused, with the cause and the cure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.base import SiteModule
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


def check_rank(
    scorer: str,
    scores: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    parts: Sequence[SiteModule] = (),
) -> None:
    """Raise `DegenerateScores` for tensors of several entries whose scores are all the same.

    The cause is looked for in `parts`, those of the adapter.
    """
    if SCORERS[scorer].blind:
        return
    tied = [name for name, score in scores.items() if score.numel() > 1 and score.min() == score.max()]
    if not tied:
        return
    ids = {id(parameters[name]) for name in tied}
    concerned = [part for part in parts if any(id(parameter) in ids for parameter in part.parameters())]
    raise DegenerateScores(
        f"scorer={scorer!r} gives all entries of {_some(tied)} the same score, so they cannot be ranked. "
        + _cause_and_cure(scorer, scores, parameters, tied, concerned)
    )


def _cause_and_cure(
    scorer: str,
    scores: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tied: list[str],
    parts: list[SiteModule],
) -> str:
    if zero := [name for name, value in parameters.items() if value.numel() and not value.any()]:
        return (
            f"Cause: zero-initialised {_some(zero)}, where θ = 0 and behind which gradients vanish. Cure: attach the "
            'adapter with init="normal", or score after a warm-up (warmup_steps=10)'
        )
    if any(scores[name].any() for name in tied):
        return (
            "Cause: the weights themselves are all equal, as vectors that begin as the identity are. Cure: score "
            "after a warm-up (warmup_steps=10), or choose scorer='random'"
        )
    chosen = {id(part.get_parameter(name)): part for part in parts for name in part.choosing}
    choosing = [chosen[id(parameters[name])] for name in tied if id(parameters[name]) in chosen]
    if len(choosing) == len(tied):
        return _no_choice(scorer, choosing)
    frozen = {name: part.get_parameter(name) for part in parts for name in part.frozen}
    if empty := [name for name, value in frozen.items() if value.ndim > 1 and not value.any()]:
        return (
            f"Cause: frozen weights under them are zero ({_some(empty)}): adapters of other tasks that were never "
            "loaded add nothing. Cure: load trained ones (fuse, load_adapters)"
        )
    if scorer == "synflow":
        normed = any(isinstance(module, nn.LayerNorm) for part in parts for module in part.modules())
        why = (
            "a LayerNorm in front turns a constant input into zero" if normed else "what follows them is zero"
        )
        return f"Cause: an all-ones input does not get through: {why}. Cure: choose another scorer"
    return (
        "Cause: the loss does not depend on them, so their gradient is zero: what follows them is zero, or a narrow "
        "ReLU bottleneck is off on all examples. Cure: other or more examples, or score after a warm-up "
        "(warmup_steps=10)"
    )


def _no_choice(scorer: str, parts: list[SiteModule]) -> str:
    """Of tensors that enter through a softmax alone, when its derivative is zero."""
    if all(part.choices == 1 for part in parts):
        return (
            "Cause: they enter through a softmax alone, which is over one adapter and so always 1. Cure: fuse two or "
            "more adapters, or leave these tensors out (maskable=names of the others)"
        )
    where = "when all weights are |θ| and the input is ones" if scorer == "synflow" else "on all examples"
    return (
        f"Cause: they enter through a softmax alone, and it is saturated {where} (one of the adapters takes all the "
        "attention), so its derivative is zero. Cure: choose another scorer, or leave these tensors out "
        "(maskable=names of the others)"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
