"""What a mask must be compared with before one may say that its scores know anything (Frankle et al. 2021)."""

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
TRADES = 64  # rounds of trades between rows; from about 16 on, nothing of the mask's own pattern is left


def controls(masks: Masks, seed: int = 0) -> dict[str, Masks | Adapter]:
    """Five masks and an adapter that ask where the gain of `masks` comes from.

    - `"shuffled"`: each tensor's mask with its entries permuted. As good? Then *which* weights of a tensor stay does
      not matter.
    - `"margins"`: the same, but every row and every column keeps its number of entries: all units and all coordinates
      stay as much in favour as they were. As good, and `"shuffled"` is not? Then it is the units and coordinates that
      matter, not the single weights. (A vector is shuffled whole.)
    - `"random"`: a fresh random mask of the same density per tensor. It has the law of `"shuffled"`: the difference of
      the two is noise, and says how much of it there is.
    - `"uniform"`: random with the overall density in every tensor. Worse? Then it is *how many* stay where.
    - `"reinitialised"`: the same mask on other initial weights (`init_seed` differs). As good? Then the pairing of mask
      and weights does not matter.
    - `"dense"`: the adapter with a smaller bottleneck (or rank), and as near as can be as many weights as are kept.
      Left out for an adapter whose number of weights no such field sets (`AdapterFusion`).

    The masks are not at work yet: `control.attach(model)` attaches their adapter with `init_seed` under them, and
    `control.apply(attachment)` puts them on one that is there. `masks` stay as they are, and must be on an
    attachment (for the sizes of `"dense"`).
    """
    if masks.attachment is None:
        raise ArgumentError(
            "these masks are on no attachment; use Masks.of(attachment) or masks.apply(attachment)"
        )
    found: dict[str, Masks | Adapter] = {name: control(masks, name, seed) for name in CONTROLS}
    adapter = adapter_from_dict(masks.provenance["adapter"])
    kinds = masks.provenance["maskable"]
    with suppress(UnsupportedError):
        found["dense"] = dense_adapter(
            adapter,
            masks.attachment.model,
            masks.entries - masks.removed,
            maskable=kinds if isinstance(kinds, str) else tuple(kinds),
        )
    return found


def control(masks: Masks, name: str, seed: int = 0) -> Masks:
    """One of the masks of `controls`, by name; it needs no attachment."""
    check_choice("control", name, CONTROLS)
    check_whole("seed", seed, least=0)
    noise = np.random.default_rng([seed, _STREAMS[name]])
    init_seed = masks.init_seed
    if name == "reinitialised":
        init_seed = int(noise.integers(2**31))
        kept = dict(masks.kept)
    elif name == "shuffled":
        kept = {key: _shuffled(mask, noise) for key, mask in masks.kept.items()}
    elif name == "margins":
        kept = {key: _within_margins(mask, noise) for key, mask in masks.kept.items()}
    elif name == "random":
        kept = {key: _random(mask, int(mask.sum()), noise) for key, mask in masks.kept.items()}
    else:
        kept = _uniform(masks, noise)
    provenance = {
        **masks.provenance,
        "control": name,
        "control_seed": seed,
        "init_seed": init_seed,
        "tied": 0,
    }
    return Masks(kept, masks.places, provenance)


def _shuffled(mask: Tensor, noise: np.random.Generator) -> Tensor:
    return torch.from_numpy(noise.permutation(mask.numpy().ravel()).reshape(mask.shape))


def _within_margins(mask: Tensor, noise: np.random.Generator) -> Tensor:
    """Drawn evenly from all masks with the same row and column sums, by global curveball trades (Carstens et al. 2018).

    In a round rows meet in pairs, and the columns that just one of the two has are dealt out anew, as many to each as
    it had.
    """
    if mask.ndim < 2:
        return _shuffled(mask, noise)
    matrix = mask.numpy().reshape(len(mask), -1)
    rows = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).copy()
    for _ in range(TRADES if len(rows) > 1 else 0):
        one, other = noise.permutation(len(rows))[: len(rows) // 2 * 2].reshape(2, -1)
        both, single = rows[one] & rows[other], rows[one] ^ rows[other]
        own = (rows[one] & single).sum(axis=1, keepdims=True)
        order = np.where(single, noise.random(single.shape), 2.0).argsort(
            axis=1
        )  # what is traded comes first
        dealt = np.zeros_like(single)
        np.put_along_axis(dealt, order, np.arange(single.shape[1]) < own, axis=1)
        rows[one], rows[other] = both | dealt, both | (single & ~dealt)
    found = rows if matrix.shape[0] <= matrix.shape[1] else rows.T
    return torch.from_numpy(np.ascontiguousarray(found).reshape(mask.shape))


def _random(mask: Tensor, keep: int, noise: np.random.Generator) -> Tensor:
    flat = np.zeros(mask.numel(), dtype=bool)
    flat[noise.choice(mask.numel(), keep, replace=False)] = True
    return torch.from_numpy(flat.reshape(mask.shape))


def _uniform(masks: Masks, noise: np.random.Generator) -> dict[str, Tensor]:
    shapes = {name: tuple(mask.shape) for name, mask in masks.kept.items()}
    scores = {name: torch.from_numpy(noise.random(shape, np.float32)) for name, shape in shapes.items()}
    found = pools("random", masks.removed / masks.entries, "tensor", shapes, masks.places)
    return keep_best(scores, found)[0]
