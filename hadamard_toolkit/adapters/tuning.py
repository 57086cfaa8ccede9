"""Methods without modules of their own: they choose which parameters of the backbone train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import (
    NORMS,
    Adapter,
    Declared,
    Layers,
    Tuning,
    check_layers,
    norm_tunings,
    register,
)
from hadamard_toolkit.errors import UnsupportedError, check_choice
from hadamard_toolkit.sites import Sites


@register
@dataclass(frozen=True)
class HeadOnly(Adapter):
    """Nothing but the task head: the control row of every table."""

    def declare(self, sites: Sites) -> Iterator[Declared]:
        yield from ()


@register
@dataclass(frozen=True)
class LayerNormTuning(Adapter):
    """Train the norms and nothing else of the backbone (Qi et al. 2022; ValizadehAslani and Liang 2024).

    Parameters
    ----------
    norm: `"attention"` (the norm that follows self-attention), `"output"` (the one that follows the feed-forward
        block) or `"both"`. On BERT-base 18,432, 18,432 and 36,864 parameters.
    layers: `"all"` or indices.
    """

    norm: str = "attention"
    layers: Layers = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_choice("norm", self.norm, [norm for norm in NORMS if norm])

    def declare(self, sites: Sites) -> Iterator[Declared]:
        yield from norm_tunings(sites, self.layers, self.norm)


@register
@dataclass(frozen=True)
class FullFineTuning(Adapter):
    """Train every parameter of the backbone, embeddings included."""

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for name in sites.base_parameters():
            yield Tuning(name, "adapter", f"base.{name}")


@register
@dataclass(frozen=True)
class BitFit(Adapter):
    """Train every bias of the backbone, the embedding norm's and the pooler's among them (Ben Zaken et al. 2022).

    On BERT-base 102,912 parameters.
    """

    def declare(self, sites: Sites) -> Iterator[Declared]:
        found = [
            name
            for name in sites.base_parameters()
            if name.rpartition(".")[2] in ("bias", "q_bias", "v_bias")
        ]
        if not found:
            kind = sites.model.config.model_type
            raise UnsupportedError(f"BitFit trains biases, and this {kind} backbone has none")
        for name in found:
            yield Tuning(name, "adapter", f"base.{name}")
