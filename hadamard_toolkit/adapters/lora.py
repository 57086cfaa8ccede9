"""LoRA: a low-rank change of a projection (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule, register
from hadamard_toolkit.adapters.fields import Layers, all_layers, number, one_of, some_of, whole
from hadamard_toolkit.adapters.gates import GATED, Gate, check_gate
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Site, Sites, features, linear_weight

TARGETS = ("query", "key", "value", "attention_output", "ffn_inner", "ffn_output")
INITS = ("zero", "normal")


class LowRank(SiteModule):
    """h + s·B A x with A [rank, in] and B [out, rank]; x is the input of the site's projection, h its output.

    s is `scaling`, or the value of the gate where there is one.
    """

    projections = ("A", "B")
    gates = ("gate.weight", "gate.bias")

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        rank: int,
        *,
        scaling: float,
        dropout: float,
        init: str,
        gated: str | None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, fan_in))
        self.B = nn.Parameter(torch.zeros(fan_out, rank))
        if init == "normal":
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.B, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.gate = Gate(fan_in, gated) if gated else None

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        change = F.linear(F.linear(self.dropout(inputs.to(self.A.dtype)), self.A), self.B)
        change = change * (self.scaling if self.gate is None else self.gate(inputs))
        return (hidden + change).to(hidden.dtype)

    def check_fold(self, site: Site) -> None:
        if self.gate is not None:
            raise UnsupportedError(
                f"gated LoRA at {site.name} is not linear in its input: it cannot be merged"
            )

    def fold(self, site: Site) -> None:
        """W' = W + s·B A, in the rows of the site; in float64."""
        weight = linear_weight(site.module)
        change = self.scaling * (self.B.double() @ self.A.double())
        weight[site.rows] = (weight[site.rows].double() + change).to(weight.dtype)


@register
@dataclass(frozen=True)
class LoRA(Adapter):
    """h = W x + (alpha / rank)·B A x (Hu et al. 2021, equation 3).

    Parameters
    ----------
    rank: of the change; A is [rank, in], B is [out, rank].
    alpha: the change is scaled by alpha / rank.
    targets: the sites behind the projections that change: any of `"query"`, `"key"`, `"value"`, `"attention_output"`
        (W_O), `"ffn_inner"` and `"ffn_output"` (the first and second projection of the feed-forward block; in gated
        blocks the first of the two that read the input, or both where they are fused).
    dropout: on the input of A.
    init: `"zero"` (A Kaiming-uniform, B = 0: the identity at the start) or `"normal"` (both N(0, 0.02²), as pruning
        before training needs: with B = 0 every score of A and of B vanishes).
    gated: None, or UniPELT's gate in place of alpha / rank (Mao et al. 2022), one for each target, which reads what the
        projection reads: `"original"` (its mean includes padding) or `"masked"`.
    layers: `"all"` or indices.

    On BERT-base, rank 8 on query and value: 294,912 parameters. It merges exactly unless it is gated. In fused
    projections (gpt2, modernbert, deberta) each target has its own factors, which change its rows alone.
    """

    rank: int = whole(8)
    alpha: float = number(8.0, above=0)
    targets: tuple[str, ...] = some_of(("query", "value"), TARGETS)
    dropout: float = number(0.0, least=0, below=1)
    init: str = one_of("zero", INITS)
    gated: str | None = one_of(None, GATED)
    layers: Layers = all_layers()

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for target in self.targets if self.gated else ():
            check_gate(sites, target)
        for layer in sites.layers(self.layers):
            for target in self.targets:
                site = sites(layer, target)
                module = LowRank(
                    features(site.module)[0],
                    site.width,
                    self.rank,
                    scaling=self.alpha / self.rank,
                    dropout=self.dropout,
                    init=self.init,
                    gated=self.gated,
                )
                yield Insertion(site, module)
