"""Masks to compare a mask with before concluding that its scores carry information (Frankle et al. 2021)."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_choice, check_whole
from hadamard_toolkit.sparsity.allocate import keep_best, pools
from hadamard_toolkit.sparsity.budgets import dense_adapter
from hadamard_toolkit.sparsity.masks import Masks
from hadamard_toolkit.sparsity.spec import CONTROLS

_STREAMS = {"shuffled": 0x5F, "margins": 0x3C, "random": 0x4A, "uniform": 0x0F, "reinitialised": 0x11}
TRADES = 64  # rounds of trades between rows; from about 16 on, nothing is left of the pattern of the mask


def controls(masks: Masks, seed: int = 0) -> dict[str, Masks | Adapter]:
    """Five masks and an adapter that ask where the gain of `masks` comes from.

    - `"shuffled"`: each tensor's mask with its entries permuted. As good? Then *which* weights of a tensor stay does
      not matter.
    - `"margins"`: the same, but every row and every column keeps its number of entries, so units and coordinates are
      as dense as before. As good, and `"shuffled"` is not? Then units and coordinates matter, not the single weights.
      (A vector is shuffled whole.)
    - `"random"`: a fresh random mask of the same density per tensor. It has the law of `"shuffled"`: the difference of
      the two is noise, and shows how much of it there is.
    - `"uniform"`: random with the overall density in every tensor. Worse? Then *how many* weights stay in which tensor
      matters.
    - `"reinitialised"`: the same mask on other initial weights (`init_seed` differs). As good? Then the pairing of mask
      and weights does not matter.
    - `"dense"`: the adapter with a smaller bottleneck (or rank), and as near as possible to the number of weights that
      are kept. Left out for an adapter without such a field (`AdapterFusion`).

    The masks are not applied yet: `control.attach(model)` attaches their adapter with `init_seed` under them, and
    `control.apply(attachment)` puts them on an attachment that exists. `masks` must be on an attachment (for the sizes
    of `"dense"`), and stay as they are.
    """
    if masks.attachment is None:
        raise ArgumentError(
            "these masks are on no attachment; use Masks.of(attachment) or masks.apply(attachment)"
        )
    made: dict[str, Masks | Adapter] = {name: control(masks, name, seed) for name in CONTROLS}
    adapter = adapter_from_dict(masks.provenance["adapter"])
    kinds = masks.provenance["maskable"]
    maskable = kinds if isinstance(kinds, str) else tuple(kinds)
    with suppress(UnsupportedError):
        made["dense"] = dense_adapter(
            adapter, masks.attachment.model, masks.entries - masks.removed, maskable=maskable
        )
    return made


def control(masks: Masks, name: str, seed: int = 0) -> Masks:
    """One of the masks of `controls`, by name; it needs no attachment."""
    check_choice("control", name, CONTROLS)
    check_whole("seed", seed, least=0)
    noise = np.random.default_rng([seed, _STREAMS[name]])
    changes = {"control": name, "control_seed": seed, "tied": 0}
    if name == "reinitialised":
        changes["init_seed"] = int(noise.integers(2**31))
        kept = dict(masks.kept)
    elif name == "uniform":
        kept = _uniform(masks, noise)
    else:
        redraw = {"shuffled": _shuffled, "margins": _within_margins, "random": _random}[name]
        kept = {key: redraw(mask, noise) for key, mask in masks.kept.items()}
    return Masks(kept, masks.places, masks.provenance | changes)


def _shuffled(mask: Tensor, noise: np.random.Generator) -> Tensor:
    return torch.from_numpy(noise.permutation(mask.numpy().ravel()).reshape(mask.shape))


def _within_margins(mask: Tensor, noise: np.random.Generator) -> Tensor:
    """Drawn evenly from all masks with the same row and column sums, by global curveball trades (Carstens et al. 2018).

    In a round, rows are paired, and the columns that only one row of a pair has are dealt out again, as many to each as
    it had.
    """
    if mask.ndim < 2:
        return _shuffled(mask, noise)
    matrix = mask.numpy().reshape(len(mask), -1)
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = (matrix if wide else matrix.T).copy()
    for _ in range(TRADES if len(rows) > 1 else 0):
        one, other = noise.permutation(len(rows))[: len(rows) // 2 * 2].reshape(2, -1)
        both, single = rows[one] & rows[other], rows[one] ^ rows[other]
        count = (rows[one] & single).sum(axis=1, keepdims=True)
        # In random order, what is traded first.
        order = np.where(single, noise.random(single.shape), 2.0).argsort(axis=1)
        dealt = np.zeros_like(single)
        np.put_along_axis(dealt, order, np.arange(single.shape[1]) < count, axis=1)
        rows[one], rows[other] = both | dealt, both | (single & ~dealt)
    return torch.from_numpy(np.ascontiguousarray(rows if wide else rows.T).reshape(mask.shape))


def _random(mask: Tensor, noise: np.random.Generator) -> Tensor:
    flat = np.zeros(mask.numel(), dtype=bool)
    flat[noise.choice(mask.numel(), int(mask.sum()), replace=False)] = True
    return torch.from_numpy(flat.reshape(mask.shape))


def _uniform(masks: Masks, noise: np.random.Generator) -> dict[str, Tensor]:
    shapes = {name: tuple(mask.shape) for name, mask in masks.kept.items()}
    scores = {name: torch.from_numpy(noise.random(shape, np.float32)) for name, shape in shapes.items()}
    return keep_best(scores, pools("random", masks.removed / masks.entries, "tensor", shapes, masks.places))[
        0
    ]
