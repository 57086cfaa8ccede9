"""UniPELT (Mao et al. 2022) and the three structures that K. Chen, Pang and Yang (2024) make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hadamard_toolkit.adapters.base import Adapter, Declared, register
from hadamard_toolkit.adapters.bottleneck import INITS, Pfeiffer
from hadamard_toolkit.adapters.fields import Layers, all_layers, number, one_of, whole
from hadamard_toolkit.adapters.gates import GATED
from hadamard_toolkit.adapters.ia3 import IA3
from hadamard_toolkit.adapters.lora import LoRA
from hadamard_toolkit.adapters.prefix import PrefixTuning
from hadamard_toolkit.adapters.prompt import PromptTuning
from hadamard_toolkit.adapters.stack import Stack
from hadamard_toolkit.errors import check_whole
from hadamard_toolkit.sites import Sites


@register
@dataclass(frozen=True)
class UniPELT(Adapter):
    """A bottleneck adapter, prefixes and LoRA on query and value in every layer, each behind a gate (Mao et al. 2022).

    A gate is one number per example and layer, the mean over positions of σ(w·x + b), w ~ N(0, 0.02²), b = 0:

    | gate of | reads x = | scales |
    | --- | --- | --- |
    | the adapter | the adapter's input, LN(FFN output + residual) | what it adds to the residual |
    | the prefix | the layer's input | P_K and P_V |
    | LoRA, one for query and one for value | the layer's input | B A x, in place of alpha / rank |

    (As in the authors' code; the figure of the paper has query and key. Where norms come first, the "layer's input" is
    what the attention reads, and the adapter reads the feed-forward output.)

    Parameters
    ----------
    bottleneck: of the adapter (see `Pfeiffer`); length, prefix_bottleneck: of the prefixes and of the network that they
        train through (see `PrefixTuning`); rank: of LoRA.
    gated: `"original"` (a gate's mean includes padding, as in the authors' code), `"masked"` (it does not), or None:
        no gates, the paper's ablation.
    alpha: without gates, LoRA is scaled by alpha / rank.
    dropout, init: of the adapter and of LoRA.
    layers: `"all"` or indices.

    On BERT-base 1,373,760 parameters and 36,912 of gates are stored. Without LoRA ("AP" in the paper):
    `Stack(PrefixTuning(gated="original"), Pfeiffer(gated="original"))`. `record_gates` shows what the gates do.
    """

    bottleneck: int = whole(48)
    length: int = whole(10)
    rank: int = whole(8)
    gated: str | None = one_of("original", GATED)
    alpha: float = number(8.0, above=0)
    prefix_bottleneck: int | None = whole(512, optional=True)
    dropout: float = number(0.0, least=0, below=1)
    init: str = one_of("zero", INITS)
    layers: Layers = all_layers()

    def declare(self, sites: Sites) -> Iterator[Declared]:
        common: dict[str, Any] = {"gated": self.gated, "layers": self.layers}
        change: dict[str, Any] = {**common, "dropout": self.dropout, "init": self.init}
        yield from PrefixTuning(length=self.length, bottleneck=self.prefix_bottleneck, **common).declare(
            sites
        )
        yield from LoRA(rank=self.rank, alpha=self.alpha, **change).declare(sites)
        yield from Pfeiffer(bottleneck=self.bottleneck, **change).declare(sites)


def prompt_unipelt(prompt_length: int = 10, **fields: Any) -> Stack:
    """`PromptTuning(prompt_length)`, without a gate, and `UniPELT(**fields)` (K. Chen, Pang and Yang 2024)."""
    return Stack(PromptTuning(prompt_length), UniPELT(**fields))


def ia3_prefix_bottleneck(*, length: int = 10, bottleneck: int = 48, gated: str | None = "original") -> Stack:
    """UniPELT with (IA)³ in place of LoRA (K. Chen, Pang and Yang 2024).

    The prefixes and the adapter keep their gates. (IA)³ has none; the paper does not say whether it has one there.
    """
    return Stack(
        IA3(), PrefixTuning(length=length, gated=gated), Pfeiffer(bottleneck=bottleneck, gated=gated)
    )


def stacked_unipelt(times: int = 3, **fields: Any) -> Stack:
    """`times` UniPELTs in every layer (K. Chen, Pang and Yang 2024).

    Their prefixes stand side by side, their LoRAs add up, and each adapter acts on the output of the one before it.
    """
    check_whole("times", times, least=1)
    return Stack(*(UniPELT(**fields) for _ in range(times)))
