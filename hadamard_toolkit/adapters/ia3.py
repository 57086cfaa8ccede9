"""(IA)³: keys, values and feed-forward activations scaled by learned vectors (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import (
    Adapter,
    Declared,
    Insertion,
    Layers,
    check_layers,
    check_targets,
    register,
)
from hadamard_toolkit.adapters.hadamard import HadamardVectors
from hadamard_toolkit.sites import Sites

TARGETS = ("query", "key", "value", "attention_heads", "ffn_hidden")


@register
@dataclass(frozen=True)
class IA3(Adapter):
    """softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V) and W₂ (l_ff ⊙ γ(W₁ x)), all l = 1 at first (Liu et al. 2022, section 3.3).

    Parameters
    ----------
    targets: what is scaled, by its site: `"key"`, `"value"` and `"ffn_hidden"` in the paper; `"query"` and
        `"attention_heads"` (the input of W_O) can be had too.
    layers: `"all"` or indices.

    On BERT-base 12 × (768 + 768 + 3,072) = 55,296 parameters. Merges exactly: rows and biases of the key and value
    projections, columns of W₂. (deberta adds its value bias behind the projection: there it stays unscaled.)
    """

    targets: tuple[str, ...] = ("key", "value", "ffn_hidden")
    layers: Layers = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_targets(self.targets, TARGETS))
        object.__setattr__(self, "layers", check_layers(self.layers))

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            for target in self.targets:
                site = sites(layer, target)
                yield Insertion(site, HadamardVectors(site.width, ("weight",)))
