"""How many entries stay where, exact to one entry, and which ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hadamard_toolkit.sparsity.maskable import Place

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
    order = sorted(range(len(ideal)), key=lambda place: whole[place] - ideal[place])
    for place in order[: total - sum(whole)]:
        whole[place] += 1
    return whole


def pools(
    scorer: str, sparsity: float, scope: str, shapes: Shapes, places: Mapping[str, Place]
) -> list[Pool]:
    """Who competes with whom under `scope`, and how many go: round(sparsity · N) of all N entries together.

    Pools of `"tensor"` and `"layer"` lose their share to within one entry. Erdős-Rényi divides each pool further.
    """
    groups: dict[object, list[str]] = {}
    for name in shapes:
        group = {
            "global": None,
            "tensor": name,
            "layer": (places[name].layer, places[name].layer is None and name),
        }
        groups.setdefault(group[scope], []).append(name)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    entries = [sum(sizes[name] for name in names) for names in groups.values()]
    removed = share_out(round(sparsity * sum(entries)), [sparsity * count for count in entries])
    found = [Pool(tuple(names), count) for names, count in zip(groups.values(), removed, strict=True)]
    if scorer != "erdos-renyi":
        return found
    return [part for pool in found for part in _erdos_renyi_pools(pool, shapes)]


def _erdos_renyi_pools(pool: Pool, shapes: Shapes) -> list[Pool]:
    own = {name: shapes[name] for name in pool.names}
    sizes = [math.prod(shape) for shape in own.values()]
    stay = sum(sizes) - pool.removed
    density = erdos_renyi(own, stay)
    kept = share_out(stay, [density[name] * size for name, size in zip(own, sizes, strict=True)])
    return [Pool((name,), size - keep) for name, size, keep in zip(own, sizes, kept, strict=True)]


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
    fan_out = shape[0] if shape else 1
    fan_in = math.prod(shape[1:])
    return (fan_in + fan_out) / (fan_in * fan_out)


def keep_top(scores: Tensor, keep: int) -> tuple[Tensor, int]:
    """The `keep` largest of one-dimensional `scores` as a bool tensor; among equals at the cut, those that come first.

    Also how many removed entries have the same score as a kept one: there the order decided, not the score.
    """
    if keep in (0, len(scores)):
        return torch.full_like(scores, bool(keep), dtype=torch.bool), 0
    cut = torch.kthvalue(scores, len(scores) - keep + 1).values
    above, level = scores > cut, scores == cut
    room = keep - int(above.sum())
    return above | (level & (level.cumsum(0) <= room)), int(level.sum()) - room


def keep_best(scores: Mapping[str, Tensor], found: Sequence[Pool]) -> tuple[dict[str, Tensor], int]:
    """Masks by name, in the order of `scores`, and the number of removed entries that are tied at a cut."""
    kept: dict[str, Tensor] = {}
    tied = 0
    for pool in found:
        flat = torch.cat([scores[name].flatten() for name in pool.names])
        stay, ties = keep_top(flat, len(flat) - pool.removed)
        tied += ties
        parts = stay.split([scores[name].numel() for name in pool.names])
        kept |= {name: part.view(scores[name].shape) for name, part in zip(pool.names, parts, strict=True)}
    return {name: kept[name] for name in scores}, tied
