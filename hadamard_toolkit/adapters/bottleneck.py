"""Bottleneck adapters: Houlsby et al. 2019, Pfeiffer et al. 2021, and the parallel one of He et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule, register
from hadamard_toolkit.adapters.fields import Layers, all_layers, number, one_of, whole
from hadamard_toolkit.adapters.gates import GATED, Gate
from hadamard_toolkit.sites import Site, Sites

INITS = ("zero", "normal")
ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "linear")


class Bottleneck(SiteModule):
    """h + g·s·up(dropout(act(down(x)))), where h is `hidden`, and x is h too or, if `parallel`, `inputs`.

    down [bottleneck, width] and up [width, bottleneck] have biases. The gate g, if there is one, reads x.
    """

    projections = ("down.weight", "up.weight")
    gates = ("gate.weight", "gate.bias")

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        parallel: bool = False,
        activation: str = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        init: str = "zero",
        gated: str | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        for projection in (self.down, self.up):
            nn.init.zeros_(projection.bias)
            nn.init.normal_(projection.weight, std=0.02)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        self.parallel, self.scale = parallel, scale
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.gate = Gate(width, gated) if gated else None

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        read = inputs if self.parallel else hidden
        change = self.up(self.dropout(self.activation(self.down(read.to(self.down.weight.dtype)))))
        if self.gate is not None:
            change = change * self.gate(read)
        return (hidden + self.scale * change).to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class ThroughNorm(Insertion):
    """Put the module before a norm; it reads what that norm makes of the same input."""

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # A call instead of `forward` would run this hook of the norm again.
        return (self.module(args[0], module.forward(args[0])), *args[1:])


@dataclass(frozen=True)
class _BottleneckAdapter(Adapter):
    """The fields that all bottleneck adapters share; see `Houlsby`."""

    bottleneck: int = whole(64)
    activation: str = one_of("relu", ACTIVATIONS)
    dropout: float = number(0.0, least=0, below=1)
    init: str = one_of("zero", INITS)
    scale: float = number(1.0, above=0)
    gated: str | None = one_of(None, GATED)
    layers: Layers = all_layers()

    def _module(self, site: Site, *, parallel: bool) -> Bottleneck:
        return Bottleneck(
            site.width,
            self.bottleneck,
            parallel=parallel,
            activation=self.activation,
            scale=self.scale,
            dropout=self.dropout,
            init=self.init,
            gated=self.gated,
        )


@register
@dataclass(frozen=True)
class Houlsby(_BottleneckAdapter):
    """h' = h + up(act(down(h))) behind both blocks of a layer, before dropout, residual and norm (Houlsby et al. 2019).

    Parameters
    ----------
    bottleneck: inner width.
    activation: `"relu"`, `"gelu"`, `"tanh"`, `"silu"` or `"linear"`.
    dropout: on the inner activations.
    init: `"zero"` (down Kaiming-uniform, up = 0: the identity at the start) or `"normal"` (both weights N(0, 0.02²),
        near the identity, as pruning before training needs: with up = 0 every score vanishes). Biases start at 0.
    scale: a factor of the change.
    gated: None, or a gate per adapter (Mao et al. 2022) that reads what the adapter reads: `"original"` (its mean
        includes padding) or `"masked"`.
    layers: `"all"` or indices.

    On BERT-base with 64: 2,379,264 parameters. The paper also trains the norms:
    `Stack(Houlsby(), LayerNormTuning(norm="both"))`. It is not linear, so it does not merge.
    """

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            for name in ("attention_output", "ffn_output"):
                site = sites(layer, name)
                yield Insertion(site, self._module(site, parallel=False))


@register
@dataclass(frozen=True)
class Pfeiffer(_BottleneckAdapter):
    """One adapter per layer, behind the feed-forward block and its norm (Pfeiffer et al. 2021).

    r = FFN(x) + x;  out = LN(r + up(act(down(LN(r))))): the adapter reads the normalised sum, its residual is the sum
    before that norm, and the same norm is applied to the result. Where norms come before their blocks (modernbert, t5,
    gpt2, llama) there is no such place; there it is h' = h + up(act(down(h))) at the feed-forward output, before the
    residual.

    Parameters as in `Houlsby`. On BERT-base with 48: 894,528 parameters. It does not merge.
    """

    bottleneck: int = whole(48)

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            if sites.post_norm(layer):
                site = sites(layer, "ffn_residual")
                yield ThroughNorm(site, self._module(site, parallel=True))
            else:
                site = sites(layer, "ffn_output")
                yield Insertion(site, self._module(site, parallel=False))


@register
@dataclass(frozen=True)
class ParallelAdapter(_BottleneckAdapter):
    """FFN(x) + scale·up(act(down(x))), x the input of the feed-forward block (He et al. 2022, table 1).

    Parameters as in `Houlsby`; `scale=4` is the scaled parallel adapter of that paper. On BERT-base with 64:
    1,189,632 parameters. It does not merge.
    """

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            site = sites(layer, "ffn_output")
            yield Insertion(site, self._module(site, parallel=True), source=sites(layer, "ffn_input"))
