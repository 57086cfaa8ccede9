"""(IA)³: keys, values and feed-forward activations scaled by learned vectors (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, register
from hadamard_toolkit.adapters.fields import Layers, all_layers, some_of
from hadamard_toolkit.adapters.hadamard import HadamardVectors
from hadamard_toolkit.sites import Sites

TARGETS = ("query", "key", "value", "attention_heads", "ffn_hidden")


@register
@dataclass(frozen=True)
class IA3(Adapter):
    """softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V) and W₂ (l_ff ⊙ γ(W₁ x)), all l = 1 at first (Liu et al. 2022, section 3.3).

    Parameters
    ----------
    targets: the sites that are scaled: `"key"`, `"value"` and `"ffn_hidden"` in the paper, and any of `"query"` and
        `"attention_heads"` (the input of W_O).
    layers: `"all"` or indices.

    On BERT-base 12 × (768 + 768 + 3,072) = 55,296 parameters. It merges exactly, into rows and biases of the key and
    value projections and columns of W₂. (deberta adds its value bias after the projection: it stays unscaled.)
    """

    targets: tuple[str, ...] = some_of(("key", "value", "ffn_hidden"), TARGETS)
    layers: Layers = all_layers()

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for layer in sites.layers(self.layers):
            for target in self.targets:
                site = sites(layer, target)
                yield Insertion(site, HadamardVectors(site.width, ("weight",)))
