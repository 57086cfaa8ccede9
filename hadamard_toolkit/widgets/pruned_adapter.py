"""The adapter that a pruning state describes: what a retraining trains, and what code says."""

from __future__ import annotations

import dataclasses
import re

from hadamard_toolkit.adapters.base import NORMS, Adapter
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.stack import Stack
from hadamard_toolkit.adapters.tuning import HeadOnly, LayerNormTuning
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.widgets.pruning_state import PruningState


def pruned_adapter(adapter: Adapter, state: PruningState) -> Adapter:
    """`adapter` on what `state` keeps alone: its `layers` where whole layers are kept, else a stack of its parts.

    Nothing kept is `HeadOnly()`. Raises `UnsupportedError` for an adapter whose parts have no adapter of their own.
    """
    if not state.kept:
        return HeadOnly()
    if state.kept == set(state.places):
        return adapter
    if state.whole_layers and any(field.name == "layers" for field in dataclasses.fields(adapter)):
        return dataclasses.replace(adapter, layers=state.kept_layers)  # type: ignore[call-arg]
    if not isinstance(adapter, Hadamard):
        raise UnsupportedError(
            f"{label_of(adapter)} with {state.range_text} alone cannot be trained anew: "
            + ("it has no field `layers`" if state.whole_layers else "only whole layers of it can be chosen")
        )
    by_site: dict[str, tuple[int, ...]] = {}
    for layer, site in sorted(state.kept):
        by_site[site] = (*by_site.get(site, ()), layer)
    parts: list[Adapter] = []
    for site, layers in by_site.items():
        if site == adapter.placement:
            parts.append(dataclasses.replace(adapter, layers=layers, norm=None))
        else:
            [norm] = [name for name, sites in NORMS.items() if sites == (site,)]
            parts.append(LayerNormTuning(norm=str(norm), layers=layers))
    return Stack(*parts) if len(parts) > 1 else parts[0]


def adapter_source(adapter: Adapter) -> str:
    """An adapter as code, such as `ht.Hadamard(layers=(0, 2))`."""
    if isinstance(adapter, Stack):
        return f"ht.Stack({', '.join(adapter_source(part) for part in adapter.adapters)})"
    return re.sub(r"\b([A-Z]\w*)\(", r"ht.\1(", label_of(adapter))
