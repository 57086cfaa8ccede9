"""Gates (Mao et al. 2022): one learned number per example that says how much a method contributes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.errors import DataError, UnsupportedError, check_choice
from hadamard_toolkit.sites import Sites

if TYPE_CHECKING:
    from hadamard_toolkit.adapters.attachment import Attachment

GATED = (None, "original", "masked")


class Batch:
    """What the base model was called with in the current forward pass: its padding masks [batch, positions]."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor | None] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the base model."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.masks = {name: given.get(name) for name in ("attention_mask", "decoder_attention_mask")}


class Gate(nn.Module):
    """g = mean over positions of σ(w·x + b): [batch, positions, width] in, [batch, 1, 1] out (section 3.2).

    `mode="original"` takes the mean over all positions, padding included, as the authors' code does; with
    `"masked"` padding does not count (where the model is called without a mask, nothing is padding).
    w ~ N(0, 0.02²) and b = 0, so that a fresh gate stands near one half.
    """

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        check_choice("gated", mode, [mode for mode in GATED if mode])
        self.weight = nn.Parameter(torch.randn(width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mode = mode
        self.batch = Batch()  # `listen` replaces it by the one that all gates of a model share
        self.mask = "attention_mask"

    def forward(self, read: Tensor) -> Tensor:
        if read.ndim != 3:
            raise UnsupportedError(
                f"a gate reads [batch, positions, width], and this model passes {tuple(read.shape)}"
            )
        opening = torch.sigmoid(read.to(self.weight.dtype) @ self.weight + self.bias)
        mask = self.batch.masks.get(self.mask) if self.mode == "masked" else None
        if mask is None:
            return opening.mean(-1)[:, None, None]
        if mask.shape != opening.shape:
            raise DataError(
                f"gated='masked' needs a mask [batch, positions] = {tuple(opening.shape)} like the states that the "
                f"gate reads, and {self.mask} has {tuple(mask.shape)}"
            )
        counted = mask.to(opening.dtype)
        return ((opening * counted).sum(-1) / counted.sum(-1).clamp(min=1))[:, None, None]


def listen(sites: Sites, insertions: Iterable[Insertion]) -> list[Any]:
    """Let the gates of `insertions` see the masks of the forward pass; the hook's handle, or none without gates.

    Call it after all other wiring, so that the mask is the one that the base model sees in the end.
    """
    base: Any = sites.base
    decoder = set(base.decoder.modules()) if sites.model.config.is_encoder_decoder else set()
    batch, found = Batch(), False
    for insertion in insertions:
        for gate in insertion.module.modules():
            if isinstance(gate, Gate):
                gate.batch, found = batch, True
                gate.mask = "decoder_attention_mask" if insertion.site.module in decoder else "attention_mask"
    return [base.register_forward_pre_hook(batch.note, with_kwargs=True)] if found else []


class GateRecord:
    """The values that gates took, in the order in which examples passed."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], list[Tensor]] = {}

    def _note(self, layer: int, gate: str, value: Tensor) -> None:
        self._values.setdefault((layer, gate), []).append(value.detach().float().flatten().cpu())

    def table(self) -> pd.DataFrame:
        """One row per layer, gate and example: columns `layer`, `gate` (its site), `example`, `value` in (0, 1)."""
        columns = ["layer", "gate", "example", "value"]
        rows = [
            (layer, gate, example, value)
            for (layer, gate), values in self._values.items()
            for example, value in enumerate(torch.cat(values).tolist())
        ]
        return pd.DataFrame(rows, columns=columns)


@contextmanager
def record_gates(attachment: Attachment) -> Iterator[GateRecord]:
    """`with record_gates(attachment) as record:` run batches; then `record.table()` has every gate's value.

    Raises `UnsupportedError` where the adapter has no gates.
    """
    record = GateRecord()
    handles = []
    for name, module in attachment.model.named_modules():
        if isinstance(module, Gate):
            _, _, layer, *rest = name.split(".")  # home.layers.3.query.gate
            label = ".".join(rest).removesuffix(".gate")

            def note(
                module: nn.Module, args: Any, value: Tensor, layer: int = int(layer), label: str = label
            ) -> None:
                record._note(layer, label, value)

            handles.append(module.register_forward_hook(note))
    if not handles:
        raise UnsupportedError(f"{attachment.adapter} has no gates to record")
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
