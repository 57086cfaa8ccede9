"""How many entries stay in which tensors, exact to one entry, and which ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hadamard_toolkit.sparsity.maskable import ParameterSite

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pool:
    """Tensors that compete, and how many entries of them are removed."""

    names: tuple[str, ...]
    removed: int


def share_out(total: int, ideal: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, each less than one away from its `ideal`; the ideals add up to about it.

    By largest remainder; among equals the first.
    """
    whole = [math.floor(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda index: whole[index] - ideal[index])
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def pools(
    scorer: str, sparsity: float, scope: str, shapes: Shapes, sites: Mapping[str, ParameterSite]
) -> list[Pool]:
    """Which tensors compete under `scope`, and how many entries they lose: round(sparsity · N) of all N together.

    Pools of `"tensor"` and `"layer"` lose their share to within one entry. Erdős-Rényi divides each pool further.
    """
    groups: dict[object, list[str]] = {}
    for name in shapes:
        layer = sites[name].layer
        group = {"global": None, "tensor": name, "layer": name if layer is None else layer}
        groups.setdefault(group[scope], []).append(name)
    entries = [sum(math.prod(shapes[name]) for name in names) for names in groups.values()]
    removed = share_out(round(sparsity * sum(entries)), [sparsity * count for count in entries])
    found = [Pool(tuple(names), count) for names, count in zip(groups.values(), removed, strict=True)]
    if scorer != "erdos-renyi":
        return found
    return [tensor for pool in found for tensor in _erdos_renyi_pools(pool, shapes)]


def _erdos_renyi_pools(pool: Pool, shapes: Shapes) -> list[Pool]:
    inside = {name: shapes[name] for name in pool.names}
    sizes = [math.prod(shape) for shape in inside.values()]
    keep = sum(sizes) - pool.removed
    density = erdos_renyi(inside, keep)
    kept = share_out(keep, [density[name] * size for name, size in zip(inside, sizes, strict=True)])
    return [Pool((name,), size - stay) for name, size, stay in zip(inside, sizes, kept, strict=True)]


def erdos_renyi(shapes: Shapes, keep: int) -> dict[str, float]:
    """Density per tensor, ∝ (n_in + n_out) / (n_in · n_out), such that `keep` entries stay in all (Mocanu et al. 2018).

    No density is above 1: what a full tensor cannot take goes to the others in proportion (as in RigL, Evci et al.
    2020). A vector counts as a matrix with one input, so it fills up first.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: _raw_density(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in full]
        room = keep - sum(sizes[name] for name in full)
        weight = sum(raw[name] * sizes[name] for name in rest)
        factor = room / weight if weight else 0.0
        over = {name for name in rest if factor * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else factor * raw[name] for name in shapes}
        full |= over


def _raw_density(shape: tuple[int, ...]) -> float:
    fan_out, fan_in = shape[0] if shape else 1, math.prod(shape[1:])
    return (fan_in + fan_out) / (fan_in * fan_out)


def keep_top(scores: Tensor, keep: int) -> tuple[Tensor, int]:
    """The `keep` largest of one-dimensional `scores` as a bool tensor; of equal scores at the cut the first ones.

    The number that comes with it is that of removed entries with the same score as a kept one: their order decided.
    """
    if keep in (0, len(scores)):
        return torch.full_like(scores, bool(keep), dtype=torch.bool), 0
    cut = torch.kthvalue(scores, len(scores) - keep + 1).values
    above, level = scores > cut, scores == cut
    room = keep - int(above.sum())
    return above | (level & (level.cumsum(0) <= room)), int(level.sum()) - room


def keep_best(scores: Mapping[str, Tensor], competing: Sequence[Pool]) -> tuple[dict[str, Tensor], int]:
    """Masks by name, in the order of `scores`, and the number of removed entries that are tied at a cut."""
    kept: dict[str, Tensor] = {}
    tied = 0
    for pool in competing:
        flat = torch.cat([scores[name].flatten() for name in pool.names])
        stay, ties = keep_top(flat, len(flat) - pool.removed)
        tied += ties
        parts = stay.split([scores[name].numel() for name in pool.names])
        kept |= {name: part.view(scores[name].shape) for name, part in zip(pool.names, parts, strict=True)}
    return {name: kept[name] for name in scores}, tied


def narrowed(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], final: Sequence[Pool], goal: Sequence[Pool]
) -> tuple[dict[str, Tensor], int]:
    """`keep_best` as a step on the way to `final`: with the counts of `goal`, and what is removed stays removed."""
    scores = {name: score.masked_fill(~kept[name], -torch.inf) for name, score in scores.items()}
    removed = [sum(int((~kept[name]).sum()) for name in pool.names) for pool in final]
    competing = [
        replace(last, removed=max(before, min(now.removed, last.removed)))
        for last, now, before in zip(final, goal, removed, strict=True)
    ]
    return keep_best(scores, competing)
