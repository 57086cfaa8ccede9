"""Methods without modules of their own: they choose which parameters of the backbone train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import NORMS, Adapter, Declared, Tuning, norm_tunings, register
from hadamard_toolkit.adapters.fields import Layers, all_layers, one_of
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites

# What architectures call a bias, the last part of a parameter's name.
BIASES = ("bias", "q_bias", "v_bias")


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

    norm: str = one_of("attention", [norm for norm in NORMS if norm])
    layers: Layers = all_layers()

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
        names = [name for name in sites.base_parameters() if name.rpartition(".")[2] in BIASES]
        if not names:
            architecture = sites.model.config.model_type
            raise UnsupportedError(f"BitFit trains biases, and this {architecture} backbone has none")
        for name in names:
            yield Tuning(name, "adapter", f"base.{name}")
