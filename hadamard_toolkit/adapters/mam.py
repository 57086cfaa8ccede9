"""MAM, the "mix-and-match" adapter (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import Adapter, Declared, register
from hadamard_toolkit.adapters.bottleneck import INITS, ParallelAdapter
from hadamard_toolkit.adapters.fields import Layers, all_layers, number, one_of, whole
from hadamard_toolkit.adapters.prefix import PrefixTuning
from hadamard_toolkit.sites import Sites


@register
@dataclass(frozen=True)
class MAM(Adapter):
    """Prefixes at the attention and a scaled parallel adapter at the feed-forward block (He et al. 2022, section 4.6).

    Parameters
    ----------
    length: of the prefixes.
    prefix_bottleneck: inner width of the network that the prefixes train through, or None; see `PrefixTuning`.
    bottleneck, scale, dropout, init: of the adapter FFN(x) + scale·up(relu(down(x))); see `ParallelAdapter`.
    layers: `"all"` or indices.

    The defaults are the paper's for summarisation; its GLUE runs have `length=16, bottleneck=16, scale=2.0`. On
    BERT-base 552,960 + 9,452,544 parameters are stored. The prefixes change the outputs from the start.
    """

    length: int = whole(30)
    bottleneck: int = whole(512)
    scale: float = number(4.0, above=0)
    prefix_bottleneck: int | None = whole(512, optional=True)
    dropout: float = number(0.0, least=0, below=1)
    init: str = one_of("zero", INITS)
    layers: Layers = all_layers()

    def declare(self, sites: Sites) -> Iterator[Declared]:
        yield from PrefixTuning(self.length, self.prefix_bottleneck, layers=self.layers).declare(sites)
        parallel = ParallelAdapter(
            self.bottleneck, dropout=self.dropout, init=self.init, scale=self.scale, layers=self.layers
        )
        yield from parallel.declare(sites)
