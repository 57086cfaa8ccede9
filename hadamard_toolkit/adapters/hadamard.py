"""The Hadamard adapter (Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.base import (
    NORMS,
    Adapter,
    Declared,
    Insertion,
    SiteModule,
    norm_tunings,
    register,
)
from hadamard_toolkit.adapters.fields import Layers, all_layers, one_of, some_of
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sites import Site, Sites, linear_weight

PLACEMENTS = ("attention_output", "attention_heads")
VECTORS = ("weight", "bias")
IDENTITY = {"weight": 1.0, "bias": 0.0}  # the entries of W and b before training


class HadamardVectors(SiteModule):
    """A' = W ⊙ A + b over the last axis, W and b of shape [width]; a missing vector is the identity."""

    def __init__(self, width: int, vectors: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if "weight" in vectors else None
        self.bias = nn.Parameter(torch.zeros(width)) if "bias" in vectors else None

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        if self.weight is None:
            return (hidden + self.bias).to(hidden.dtype)  # type: ignore[operator]
        if self.bias is None:
            return (hidden * self.weight).to(hidden.dtype)
        return torch.addcmul(self.bias, hidden, self.weight).to(hidden.dtype)

    @property
    def shifts(self) -> bool:
        return self.bias is not None

    def fold(self, site: Site) -> None:
        """After W_O, rows are scaled and b_O' = W ⊙ b_O + b; before it, columns, and b_O' = b_O + W_O b. In float64."""
        weight, rows = linear_weight(site.module), site.rows
        bias: Tensor | None = site.module.bias  # type: ignore[assignment]
        matrix = weight[rows].double()
        shift = torch.zeros_like(matrix[:, 0]) if bias is None else bias[rows].double()
        if site.side == "output":
            if self.weight is not None:
                matrix, shift = self.weight.double()[:, None] * matrix, self.weight.double() * shift
            if self.bias is not None:
                shift = shift + self.bias.double()
        else:
            if self.bias is not None:
                shift = shift + matrix @ self.bias.double()
            if self.weight is not None:
                matrix = matrix * self.weight.double()
        weight[rows] = matrix.to(weight.dtype)
        if bias is not None:
            bias[rows] = shift.to(bias.dtype)


@register
@dataclass(frozen=True)
class Hadamard(Adapter):
    """A' = W ⊙ A + b on self-attention outputs, W = 1 and b = 0 at the start (Chen et al. 2023, section 4).

    Parameters
    ----------
    layers: `"all"` or the indices of the layers that carry an adapter (and whose norm trains).
    placement: `"attention_output"` (after W_O, before dropout, residual and norm; the default) or
        `"attention_heads"` (before W_O, where W is the value scaling of (IA)³ and b the value bias of BitFit).
    norm: which norm trains too: `"attention"` (the one that follows), `"output"`, `"both"` or None.
    vectors: any subset of `("weight", "bias")`.

    On BERT-base: 18,432 parameters alone, 36,864 with the attention norm (0.0337 % of 109,482,240), 24,576 with it on
    8 of 12 layers. It merges exactly into W_O. On ALBERT every depth step has its own vectors, while all steps share
    one norm. An RMSNorm has a gain and no bias.
    """

    layers: Layers = all_layers()
    placement: str = one_of("attention_output", PLACEMENTS)
    norm: str | None = one_of("attention", NORMS)
    vectors: tuple[str, ...] = some_of(VECTORS, VECTORS, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vectors and self.norm is None:
            raise ArgumentError(
                "vectors=() with norm=None leaves nothing to train; use HeadOnly() for that row"
            )

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            site = sites(layer, self.placement)
            if self.vectors:
                yield Insertion(site, HadamardVectors(site.width, self.vectors))
        yield from norm_tunings(sites, self.layers, self.norm)
