"""How stock `peft` writes the methods that both know: one `Format` per method, in both directions.

Tensors are keyed by the path of the module that `peft` wraps, without its common prefix; `own` are the parameters of an
attachment by their names there (`adapter.layers.3.query.A`). What `peft` cannot say is refused, never approximated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters import ia3, lora
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.fields import Layers
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.prompt import PromptTuning, is_causal
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.interop.peft_lora import read_lora, write_lora
from hadamard_toolkit.interop.peft_tensors import (
    Tensors,
    grouped,
    paths_of,
    take,
    targets_of,
    without_idle_slices,
)
from hadamard_toolkit.sites import Site, Sites, features

# What peft puts in front of the names of a model whose modules it wraps.
BEFORE = "base_model.model."


@dataclass(frozen=True)
class Format:
    """`write` gives config entries and tensors for peft, `read` the adapter and its parameters back.

    `before_model` and `before_own` stand in front of the names of the model's parameters and of the method's tensors;
    `wraps` says whether peft wraps modules of the layers.
    """

    peft_type: str
    write: Callable[[Any, Sites, Tensors], tuple[dict[str, Any], Tensors]]
    read: Callable[[dict[str, Any], Tensors, Sites], tuple[Adapter, Tensors]]
    before_model: str = BEFORE
    before_own: str = BEFORE
    wraps: bool = True


# (IA)³ -------------------------------------------------------------------------------------------------------------


def _write_ia3(adapter: ia3.IA3, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {}
    before: list[str] = []
    transposed = False
    for path, group in grouped(sites, adapter.layers, adapter.targets).items():
        name = f"{path}.ia3_l"
        transposed |= not isinstance(group[0].module, nn.Linear)
        if group[0].side == "input":
            tensors[name] = own[f"adapter.{group[0].label}.weight"][None]
            before.append(path)
            continue
        tensors[name] = torch.ones(features(group[0].module)[1], 1)
        for site in group:
            tensors[name][site.rows, 0] = own[f"adapter.{site.label}.weight"]
    config = {
        "target_modules": [name.removesuffix(".ia3_l") for name in tensors],
        "feedforward_modules": before,
        "fan_in_fan_out": transposed,
    }
    return config, tensors


def _read_ia3(config: dict[str, Any], tensors: Tensors, sites: Sites) -> tuple[Adapter, Tensors]:
    known = grouped(sites, "all", ia3.TARGETS)
    vectors: dict[Site, Tensor] = {}
    for path in paths_of(tensors, ".ia3_l", known):
        scale = take(tensors, f"{path}.ia3_l")
        side = "input" if scale.shape[0] == 1 else "output"
        here = [site for site in known[path] if site.side == side]
        if not here:
            raise UnsupportedError(f"the file scales the {side} of {path!r}; the toolkit's (IA)³ does not")
        vectors |= {site: scale.flatten()[site.rows if side == "output" else slice(None)] for site in here}
    vectors = without_idle_slices(vectors, lambda vector: bool((vector == 1).all()))
    targets, layers = targets_of(vectors, ia3.TARGETS, sites)
    return ia3.IA3(targets, layers), {
        f"adapter.{site.label}.weight": vector for site, vector in vectors.items()
    }


# Hadamard, as GLoRA (Chavan et al. 2023): W_eff = W + W * A + B, b_eff = b + b * D + E + W C ------------------------


def _write_hadamard(adapter: Hadamard, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Behind W_O, A = D = W − 1, E = b and B = C = 0; before it, a bias alone is C = b."""
    before = adapter.placement == "attention_heads"
    if before and "weight" in adapter.vectors:
        raise UnsupportedError(
            "peft's GLoRA scales rows, not columns: W before W_O cannot be exported; merge() it"
        )
    if not adapter.vectors:
        raise UnsupportedError(
            "vectors=() inserts no module that peft could hold; export it as LayerNormTuning"
        )
    tensors: Tensors = {}
    targets = []
    for layer in sites.layers(adapter.layers):
        site = sites(layer, adapter.placement)
        linear = site.module
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(
                f"{site.path} of {type(sites.model).__name__} cannot be wrapped by peft's GLoRA"
            )
        if "bias" in adapter.vectors and linear.bias is None:
            raise UnsupportedError(
                f"{site.path} has no bias for GLoRA to shift; use vectors=('weight',) or merge()"
            )
        zero = torch.zeros(linear.out_features)
        gain = own.get(f"adapter.{site.label}.weight", zero + 1) - 1
        shift = own.get(f"adapter.{site.label}.bias", zero)
        values = {
            "glora_A.X": gain[:, None],
            "glora_B.X": zero[:, None],
            "glora_D.X": gain,
            "glora_E.X": zero if before else shift,
        }
        values |= (
            {"glora_C.X": shift[:, None]} if before else {"glora_C.zeros": torch.zeros(linear.in_features, 1)}
        )
        tensors |= {f"{site.path}.{name}": value for name, value in values.items()}
        targets.append(site.path)
    config = {
        "config_A_B": "vector",
        "config_C": "vector" if before else "none",
        "config_D_E": "vector",
        "bias": "none",
        "r": 8,
        "init_weights": True,
        "target_modules": targets,
    }
    return config, tensors


def _read_hadamard(config: dict[str, Any], tensors: Tensors, sites: Sites) -> tuple[Adapter, Tensors]:
    shape = [config.get(name) for name in ("config_A_B", "config_C", "config_D_E")]
    if shape not in (["vector", "none", "vector"], ["vector", "vector", "vector"]):
        raise UnsupportedError(f"a GLoRA of A and B, C, D and E = {shape} is no Hadamard adapter")
    before = shape[1] == "vector"
    known = grouped(sites, "all", ("attention_heads" if before else "attention_output",))
    gains: dict[Site, Tensor] = {}
    shifts: dict[Site, Tensor] = {}
    for path in paths_of(tensors, ".glora_A.X", known):
        [site] = known[path]
        gain, rest, again, behind = (take(tensors, f"{path}.glora_{name}.X").flatten() for name in "ABDE")
        ahead = take(tensors, f"{path}.glora_C.{'X' if before else 'zeros'}").flatten()
        shifts[site], gains[site] = (ahead, gain) if before else (behind, gain)
        if rest.any() or not torch.equal(gain, again) or (before and (gain.any() or behind.any())):
            raise UnsupportedError(
                f"the GLoRA of {path!r} is no Hadamard adapter, which has A = D, B = 0 and C or E"
            )
    scaled, shifted = (any(bool(value.any()) for value in values.values()) for values in (gains, shifts))
    vectors = tuple(name for name, used in (("weight", scaled), ("bias", shifted)) if used) or (
        "weight",
        "bias",
    )
    placement = "attention_heads" if before else "attention_output"
    _, layers = targets_of(gains, (placement,), sites)
    state = {f"adapter.{site.label}.weight": 1 + gain for site, gain in gains.items() if "weight" in vectors}
    state |= {f"adapter.{site.label}.bias": shift for site, shift in shifts.items() if "bias" in vectors}
    return Hadamard(layers, placement, None, vectors), state


# Prompt tuning, which peft puts in front of everything ---------------------------------------------------------------

_PROMPT = "prompt_embeddings"


def _write_prompt(adapter: PromptTuning, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    _check_prompt(sites)
    if adapter.stands_behind_first(sites):
        raise UnsupportedError(
            f"stock peft puts a prompt in front of everything, and position={adapter.position!r} puts it behind [CLS]: "
            'it cannot be exported; train PromptTuning(position="front")'
        )
    [prompt] = [value for name, value in own.items() if name.startswith("adapter.")]
    config = {
        "task_type": "SEQ_CLS",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return config, {_PROMPT: prompt}


def _read_prompt(config: dict[str, Any], tensors: Tensors, sites: Sites) -> tuple[Adapter, Tensors]:
    if config.get("task_type") != "SEQ_CLS":
        raise UnsupportedError(
            f"a prompt of task_type {config.get('task_type')!r} cannot be imported; one of 'SEQ_CLS' can"
        )
    _check_prompt(sites)
    prompt = take(tensors, _PROMPT)
    return PromptTuning(len(prompt), position="front"), {"adapter.prompt.weight": prompt}


def _check_prompt(sites: Sites) -> None:
    """Raise `UnsupportedError` where a prompt in stock peft is another function, warn where padding decides it."""
    name = type(sites.model).__name__
    if not name.endswith("ForSequenceClassification"):
        raise UnsupportedError(
            f"prompts go to and from peft for sequence classification alone, not for {name}"
        )
    if sites.model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"stock peft hands a prompt over as embeddings, which {name} does not take in place of token ids"
        )
    if is_causal(sites):
        warnings.warn(
            f"stock peft hides token ids from {name}, which then reads the last position, be it padding: "
            "the logits are the same for inputs padded on the left, or not at all",
            stacklevel=4,
        )
    elif getattr(sites.base, "pooler", None) is None:
        raise UnsupportedError(
            f"stock peft leaves the prompt's rows to the head of {name}, which counts positions: it would read the "
            "prompt for [CLS]; the toolkit takes them out"
        )


def with_norm(adapter: Adapter, norm: str, layers: Layers) -> Adapter | None:
    """`adapter` with these norms in its own `norm` field, or None where it has none that says so."""
    if isinstance(adapter, Hadamard) and adapter.layers == layers:
        return replace(adapter, norm=norm)
    return None


FORMATS: dict[type[Adapter], Format] = {
    lora.LoRA: Format("LORA", write_lora, read_lora),
    ia3.IA3: Format("IA3", _write_ia3, _read_ia3),
    Hadamard: Format("GLORA", _write_hadamard, _read_hadamard),
    PromptTuning: Format(
        "PROMPT_TUNING", _write_prompt, _read_prompt, before_model="base_model.", before_own="", wraps=False
    ),
}
