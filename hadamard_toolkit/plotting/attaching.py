"""Where an adapter attaches in a Transformer layer, and what it computes there, in words for a drawing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import BertConfig

from hadamard_toolkit.adapters.base import Adapter, Insertion
from hadamard_toolkit.adapters.bottleneck import Bottleneck, ThroughNorm
from hadamard_toolkit.adapters.declaring import declare
from hadamard_toolkit.adapters.fusion import Fusion
from hadamard_toolkit.adapters.hadamard import HadamardVectors
from hadamard_toolkit.adapters.lora import LowRank
from hadamard_toolkit.adapters.prefix import Prefix
from hadamard_toolkit.adapters.prompt import Prompt
from hadamard_toolkit.backbones import backbone_from_config
from hadamard_toolkit.sites import SITES, Sites


@dataclass
class Attaching:
    """What an adapter does in BERT-base: where it attaches, and in words what each of its parts computes.

    `lines` may name more sites than `sites`: those that a part elsewhere reads. `elsewhere` names what it trains
    outside of the layers.
    """

    sites: set[str] = field(default_factory=set)
    lines: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


def attaching(adapter: Adapter) -> Attaching:
    """Declare `adapter` on BERT-base (on the meta device: no weights are made) and describe its parts by site.

    Sites have the names of `SITES`, or `"prefix"` and `"prompt"`. Raises `ArgumentError` where the adapter names a
    layer beyond BERT-base's twelve.
    """
    with torch.device("meta"):
        sites = Sites(backbone_from_config(BertConfig()))
    declared = declare(adapter, sites, seed=0)
    result = Attaching()
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for insertion in declared.insertions.values():
        site, source = insertion.site, insertion.source
        if not site.path:  # the network that prefixes share has no place in the model
            continue
        result.sites.add(site.name)
        layers[site.name, _formula(insertion)] += [] if site.layer is None else [site.layer]
        if source is not None and source.layer is not None:
            layers[source.name, f"x, read by the adapter at {site.name}"].append(source.layer)

    trained: dict[tuple[str, int], list[str]] = defaultdict(list)
    grid = [sites(layer, name) for layer in range(len(sites)) for name in SITES]
    modules = {site.path: (site.name, cast(int, site.layer)) for site in grid if site.side != "input"}
    for tuning in declared.tunings:
        module, _, parameter = tuning.path.rpartition(".")
        if module in modules:
            trained[modules[module]].append(parameter)
        else:
            result.elsewhere.append(tuning.path.removeprefix("bert.").partition(".")[0])
    for (name, layer), parameters in trained.items():
        result.sites.add(name)
        layers[name, f"{' and '.join(parameters)} {'are' if len(parameters) > 1 else 'is'} trained"].append(
            layer
        )

    result.elsewhere = list(dict.fromkeys(result.elsewhere))
    for (name, text), where in layers.items():
        everywhere = not where or len(where) == len(sites)
        result.lines.setdefault(name, []).append(text if everywhere else f"{text} ({_named(where)})")
    return result


def _named(layers: Iterable[int]) -> str:
    numbers = [str(layer) for layer in sorted(set(layers))]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def _formula(insertion: Insertion) -> str:
    """What the part computes, as it says itself or as is known here; else the name of its class."""
    module: Any = insertion.module
    gate = "g · " if getattr(module, "gate", None) is not None else ""
    match module:
        case HadamardVectors():
            letter = "A" if insertion.site.name.startswith("attention") else "h"
            scaled = letter if module.weight is None else f"W ⊙ {letter}"
            return f"{letter}′ = {scaled}" + ("" if module.bias is None else " + b")
        case Bottleneck():
            read = "x" if module.parallel else "h"
            scale = "" if module.scale == 1 else f"{module.scale:g} · "
            norm = ", x = norm(h)" if isinstance(insertion, ThroughNorm) else ""
            return f"h′ = h + {gate}{scale}up(act(down({read}))){norm}"
        case LowRank():
            return f"h′ = h + {gate or 'α/r · '}B A x"
        case Fusion():
            return "h′ = h + Σₜ softmaxₜ(Q x · K zₜ) V zₜ"
        case Prefix():
            return f"keys [{gate}P_K; K], values [{gate}P_V; V]"
        case Prompt():
            return "[e₁; P; e₂ … eₙ]" if module.behind_first else "[P; e₁; e₂ … eₙ]"
    return module.formula or type(module).__name__
