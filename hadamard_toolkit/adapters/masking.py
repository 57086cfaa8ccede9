"""Masks of an attachment: how the removed entries are kept at zero, and the files of masks.

How masks are made and what they show belongs to `hadamard_toolkit.sparsity`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.paths import atomic_files

BITS, RECORD = "masks.safetensors", "masks.json"
FORMAT = 1

# Parameter name -> bool tensor of its shape, True where the entry stays.
Kept = Mapping[str, Tensor]


class _Masked:
    """One parameter and its mask; `dense` has the values that its removed entries had before."""

    def __init__(self, parameter: nn.Parameter, kept: Tensor) -> None:
        self.parameter, self.kept = parameter, kept.to("cpu", torch.bool)
        # The complement of the mask, on the parameter's device.
        self._removed: Tensor | None = None
        self.dense = parameter.detach().clone()
        self._hook()
        self.enforce()

    def _hook(self) -> None:
        # torch hooks only what requires a gradient at that moment.
        required = self.parameter.requires_grad
        self.parameter.requires_grad_(True)
        self.handle = self.parameter.register_hook(self._on_gradient)
        self.parameter.requires_grad_(required)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # torch copies and pickles parameters without their hooks.
        self._hook()

    @property
    def removed(self) -> Tensor:
        if self._removed is None or self._removed.device != self.parameter.device:
            self._removed = (~self.kept).to(self.parameter.device)
        return self._removed

    def _on_gradient(self, gradient: Tensor) -> Tensor:
        # Not a product, which would let a gradient of inf or nan through.
        return gradient.masked_fill(self.removed, 0.0)

    def change(self, kept: Tensor, dense: Tensor) -> None:
        self.kept, self.dense, self._removed = kept, dense, None

    @torch.no_grad()
    def enforce(self) -> None:
        self.parameter.masked_fill_(self.removed, 0.0)

    @torch.no_grad()
    def restore(self) -> None:
        self.parameter.copy_(torch.where(self.removed, self.dense.to(self.parameter), self.parameter))


class Masking:
    """Masks at work: a removed entry has value and gradient zero.

    So AdamW and SGD do not move it: its momentum stays zero, and weight decay of zero is zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kept: Kept, record: dict[str, Any]) -> None:
        check_fit(parameters, kept)
        self.record = record
        self._masked = {name: _Masked(parameters[name], mask) for name, mask in kept.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """The masks, on the CPU."""
        return {name: masked.kept for name, masked in self._masked.items()}

    def removed(self) -> dict[str, int]:
        """Removed entries by parameter name."""
        return {name: int((~masked.kept).sum()) for name, masked in self._masked.items()}

    def narrow(self, kept: Kept) -> None:
        """Replace the masks by some that keep less; `release` restores the values that the entries have now."""
        for name, mask in kept.items():
            masked = self._masked[name]
            if (mask & ~masked.kept).any():
                raise ArgumentError(f"the new mask of {name!r} keeps entries that were removed before")
            values = masked.parameter.detach()
            masked.change(mask, torch.where(masked.removed, masked.dense.to(values), values))
            masked.enforce()

    def enforce(self) -> None:
        """Set removed entries to zero again, after values came from elsewhere."""
        for masked in self._masked.values():
            masked.enforce()

    def release(self, *, restore: bool) -> None:
        """Stop masking; with `restore`, removed entries get back the values that they had when they were removed."""
        for masked in self._masked.values():
            if restore:
                masked.restore()
            masked.handle.remove()
        self._masked = {}

    def state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The masks and the removed values, for `put_back`."""
        return {name: (masked.kept, masked.dense) for name, masked in self._masked.items()}

    def put_back(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Undo every `narrow` since `state` was taken; the caller restores the values of the parameters."""
        for name, (kept, dense) in state.items():
            self._masked[name].change(kept, dense)


def check_fit(parameters: Mapping[str, Tensor], kept: Kept) -> None:
    """Raise `DataError` unless every mask fits a parameter of its name."""
    for name, mask in kept.items():
        if name not in parameters:
            raise DataError(f"there is a mask for {name!r}, which is not a parameter of this attachment")
        if mask.shape != parameters[name].shape:
            raise DataError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}; "
                f"this parameter has {tuple(parameters[name].shape)}"
            )


# files -------------------------------------------------------------------------------------------------------


def mask_files(kept: Kept, record: dict[str, Any]) -> dict[str, bytes]:
    """The content of `masks.safetensors` (one bit per entry) and `masks.json` (shapes and `record`), by file name."""
    bits = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().ravel())) for name, mask in kept.items()}
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    text = json.dumps({"format": FORMAT, "shapes": shapes, **record}, indent=1) + "\n"
    return {BITS: save(bits), RECORD: text.encode()}


def write_masks(folder: Path, kept: Kept, record: dict[str, Any]) -> None:
    """Write the `mask_files` into `folder`, both or none."""
    atomic_files(folder, mask_files(kept, record))


def read_masks(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The masks by parameter name and the record, from the files of `write_masks`."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        shapes, bits = record.pop("shapes"), load_file(folder / BITS)
    except FileNotFoundError:
        raise ArgumentError(
            f"folder={str(folder)!r} holds no masks ({RECORD} or {BITS} is missing)"
        ) from None
    except (ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise DataError(f"the masks in folder={str(folder)!r} are damaged: {error!r}") from None
    if (version := record.pop("format", None)) != FORMAT:
        raise DataError(
            f"the masks in folder={str(folder)!r} have format {version!r}; this version reads {FORMAT}"
        )
    return {name: _unpack(name, bits, shape) for name, shape in shapes.items()}, record


def _unpack(name: str, bits: Mapping[str, Tensor], shape: list[int]) -> Tensor:
    size = int(np.prod(shape, dtype=np.int64))
    if name not in bits or bits[name].numel() != -(-size // 8):
        raise DataError(
            f"the bits of the mask of {name!r} are missing or of another length than its shape {shape}"
        )
    flat = np.unpackbits(bits[name].numpy(), count=size).astype(bool)
    return torch.from_numpy(flat.reshape(shape))


def compact(state: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """`state` with only the kept entries, in one row, of every tensor that has a mask."""
    return state | {name: state[name][mask] for name, mask in kept.items()}


def expand(state: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The inverse of `compact`: removed entries are zero."""
    full = dict(state)
    for name, mask in kept.items():
        if name not in state or state[name].shape != (int(mask.sum()),):
            raise DataError(
                f"the kept entries of {name!r} do not fit its mask, which keeps {int(mask.sum())}"
            )
        full[name] = torch.zeros(mask.shape, dtype=state[name].dtype)
        full[name][mask] = state[name]
    return full
