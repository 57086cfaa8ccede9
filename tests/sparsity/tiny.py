"""Tiny attachments and batches for the tests of sparsity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from tests.architectures import tiny_batch, tiny_model

# A tiny ReLU bottleneck may be off on all of a few examples; then no score can rank it.
ADAPTERS: dict[str, Adapter] = {
    "houlsby": ht.Houlsby(bottleneck=3, init="normal", activation="gelu"),
    "pfeiffer": ht.Pfeiffer(bottleneck=4, init="normal", activation="gelu"),
    "lora": ht.LoRA(rank=2, init="normal"),
    "mam": ht.MAM(length=2, bottleneck=4, prefix_bottleneck=3, init="normal"),
    "fusion": ht.AdapterFusion(("one", "two"), bottleneck=2),
    "unipelt": ht.UniPELT(bottleneck=3, length=2, rank=2, prefix_bottleneck=3, init="normal"),
}


def batches(*sizes: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """One batch with labels per size."""
    found = []
    for place, rows in enumerate(sizes or (4, 3)):
        batch = tiny_batch(rows, seed=seed + place)
        found.append({**batch, "labels": torch.arange(rows) % 2})
    return found


def attached(
    adapter: Adapter | None = None, *, architecture: str = "bert", seed: int = 0, **config: Any
) -> ht.Attachment:
    """A tiny model with `adapter` (Houlsby of width 3). A fusion's single-task adapters are drawn at random."""
    model = tiny_model(architecture, **config)
    attachment = ht.attach(model, adapter or ADAPTERS["houlsby"], seed=seed)
    if isinstance(adapter, ht.AdapterFusion):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in attachment.named_parameters("adapter").items():
                if ".tasks." in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return attachment


def pruned(attachment: ht.Attachment, masks: ht.Masks) -> Tensor:
    """All entries that should be zero, in one row."""
    own = attachment.named_parameters()
    return torch.cat([own[name].detach()[~mask].flatten().float().cpu() for name, mask in masks.kept.items()])
