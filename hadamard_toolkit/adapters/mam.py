"""MAM, the "mix-and-match" adapter (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import Adapter, Declared, Layers, check_layers, register
from hadamard_toolkit.adapters.bottleneck import ParallelAdapter
from hadamard_toolkit.adapters.prefix import PrefixTuning
from hadamard_toolkit.sites import Sites


@register
@dataclass(frozen=True)
class MAM(Adapter):
    """Prefixes at the attention and a scaled parallel adapter at the feed-forward block (He et al. 2022, section 4.6).

    Parameters
    ----------
    length: of the prefixes.
    prefix_bottleneck: inner width of the prefixes' training-time network, or None; see `PrefixTuning`.
    bottleneck, scale, dropout, init: of the adapter FFN(x) + scale·up(relu(down(x))); see `ParallelAdapter`.
    layers: `"all"` or indices.

    The defaults are the paper's for summarisation; its GLUE runs have `length=16, bottleneck=16, scale=2.0`. On
    BERT-base 552,960 + 9,452,544 parameters are stored. The prefixes change the outputs from the start.
    """

    length: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    prefix_bottleneck: int | None = 512
    dropout: float = 0.0
    init: str = "zero"
    layers: Layers = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        self._parts()

    def _parts(self) -> tuple[Adapter, Adapter]:
        """Built to check the fields, too."""
        return (
            PrefixTuning(length=self.length, bottleneck=self.prefix_bottleneck, layers=self.layers),
            ParallelAdapter(
                bottleneck=self.bottleneck,
                scale=self.scale,
                dropout=self.dropout,
                init=self.init,
                layers=self.layers,
            ),
        )

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for part in self._parts():
            yield from part.declare(sites)
