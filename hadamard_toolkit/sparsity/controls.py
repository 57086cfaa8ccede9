"""What a mask must be compared with before one may say that its scores know anything (Frankle et al. 2021)."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_choice
from hadamard_toolkit.sparsity.allocate import keep_best, pools
from hadamard_toolkit.sparsity.budgets import dense_adapter
from hadamard_toolkit.sparsity.masks import Masks
from hadamard_toolkit.sparsity.spec import CONTROLS, check_whole

_STREAMS = {"shuffled": 0x5F, "random": 0x4A, "uniform": 0x0F, "reinitialised": 0x11}


def controls(masks: Masks, seed: int = 0) -> dict[str, Masks | Adapter]:
    """Four masks and an adapter that ask where the gain of `masks` comes from.

    - `"shuffled"`: each tensor's mask with its entries permuted. As good? Then *which* weights of a tensor stay does
      not matter.
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
    check_whole("seed", seed, 0)
    noise = np.random.default_rng([seed, _STREAMS[name]])
    init_seed = masks.init_seed
    if name == "reinitialised":
        init_seed = int(noise.integers(2**31))
        kept = dict(masks.kept)
    elif name == "shuffled":
        kept = {key: _shuffled(mask, noise) for key, mask in masks.kept.items()}
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


def _random(mask: Tensor, keep: int, noise: np.random.Generator) -> Tensor:
    flat = np.zeros(mask.numel(), dtype=bool)
    flat[noise.choice(mask.numel(), keep, replace=False)] = True
    return torch.from_numpy(flat.reshape(mask.shape))


def _uniform(masks: Masks, noise: np.random.Generator) -> dict[str, Tensor]:
    shapes = {name: tuple(mask.shape) for name, mask in masks.kept.items()}
    scores = {name: torch.from_numpy(noise.random(shape, np.float32)) for name, shape in shapes.items()}
    found = pools("random", masks.removed / masks.entries, "tensor", shapes, masks.places)
    return keep_best(scores, found)[0]
