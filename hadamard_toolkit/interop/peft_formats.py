"""How stock `peft` writes the methods that both know: one `Format` per method, in both directions.

Tensors are keyed by the path of the module that `peft` wraps, without its common prefix; `own` are the parameters of an
attachment by their names there (`adapter.layers.3.query.A`). What `peft` cannot say is refused, never approximated.
"""

from __future__ import annotations

import re
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
from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.sites import Site, Sites, features

Tensors = dict[str, Tensor]
BEFORE = "base_model.model."  # what peft puts in front of the names of a model that it wraps modules of


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


def _grouped(sites: Sites, layers: Layers, targets: tuple[str, ...]) -> dict[str, list[Site]]:
    """The sites of `targets`, by the path of their module: several where a projection is fused."""
    found: dict[str, list[Site]] = {}
    for layer in sites.layers(layers):
        for target in targets:
            site = sites(layer, target)
            found.setdefault(site.path, []).append(site)
    return found


def _targets_of(
    found: dict[Site, Any], names: tuple[str, ...], sites: Sites
) -> tuple[tuple[str, ...], Layers]:
    """The `targets` and `layers` fields that say `found`; every layer must have the same targets."""
    by_layer: dict[int, set[str]] = {}
    for site in found:
        assert site.layer is not None
        by_layer.setdefault(site.layer, set()).add(site.name)
    if not by_layer:
        raise DataError("the file holds no tensor of a layer")
    targets = next(iter(by_layer.values()))
    if any(other != targets for other in by_layer.values()):
        listed = ", ".join(f"{layer}: {sorted(names)}" for layer, names in by_layer.items())
        raise UnsupportedError(
            f"the layers of the file have different targets ({listed}); an adapter has one set"
        )
    layers = tuple(sorted(by_layer))
    return tuple(name for name in names if name in targets), "all" if len(layers) == len(sites) else layers


def _take(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise DataError(f"tensor {name!r} is missing from the file")
    return tensors.pop(name)


def _paths(tensors: Tensors, ending: str, known: dict[str, list[Site]]) -> list[str]:
    """Paths of all tensors with this ending; each must be a module that the toolkit has sites for."""
    paths = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    for path in paths:
        if path not in known:
            raise UnsupportedError(
                f"the file changes {path!r}, which is no projection that the toolkit adapts"
            )
    return paths


# LoRA --------------------------------------------------------------------------------------------------------------


def _write_lora(adapter: lora.LoRA, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    """In a fused projection the factors of n targets become one of rank n·r with the scale kept."""
    if adapter.gated:
        raise UnsupportedError("peft's LoRA has no gates: a gated LoRA cannot be exported")
    tensors: Tensors = {}
    ranks, alphas, transposed = {}, {}, False
    for path, group in _grouped(sites, adapter.layers, adapter.targets).items():
        factors = [(own[f"adapter.{site.label}.A"], own[f"adapter.{site.label}.B"]) for site in group]
        tensors[f"{path}.lora_A.weight"] = torch.cat([a for a, _ in factors])
        wide = torch.zeros(features(group[0].module)[1], adapter.rank * len(group))
        for index, (site, (_, b)) in enumerate(zip(group, factors, strict=True)):
            wide[site.rows, index * adapter.rank : (index + 1) * adapter.rank] = b
        tensors[f"{path}.lora_B.weight"] = wide
        if len(group) > 1:
            ranks[path], alphas[path] = adapter.rank * len(group), adapter.alpha * len(group)
        transposed |= not isinstance(group[0].module, nn.Linear)
    config = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "target_modules": [
            name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
        ],
    }
    return config, tensors


def _pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    fitting = [value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path)]
    return fitting[0] if fitting else default


# Initial values that leave the base weights alone: what was trained is then A and B, wherever they started.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Entries of peft's config that say where a LoRA is, or how it is trained, or what its tensors say as well. Any other
# that is set makes it another function.
_NO_OTHER_FUNCTION = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "init_lora_weights",
        "r",
        "lora_alpha",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
    ),
    *("use_rslora", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "fan_in_fan_out", "bias", "use_dora", "lora_bias", "target_parameters"),
    *(
        "trainable_token_indices",
        "megatron_core",
        "runtime_config",
        "ensure_weight_tying",
        "qalora_group_size",
    ),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"),
}


def _check_lora(config: dict[str, Any]) -> None:
    """Raise `UnsupportedError` for a LoRA that is not h + s·B A x on the weights of the backbone as they are."""
    init = config.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise UnsupportedError(
            f"init_lora_weights={init!r} changes the weights of the backbone, or makes another function of the file's "
            "tensors: it cannot be imported. For PiSSA, OLoRA and CorDA, let peft write a plain LoRA, "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=…), and import that"
        )
    for name, value in config.items():
        if value and name not in _NO_OTHER_FUNCTION:
            raise UnsupportedError(f"a LoRA with {name}={value!r} is another function: it cannot be imported")


def _read_lora(config: dict[str, Any], tensors: Tensors, sites: Sites) -> tuple[Adapter, Tensors]:
    _check_lora(config)
    known = _grouped(sites, "all", lora.TARGETS)
    factors: dict[Site, tuple[Tensor, Tensor, float]] = {}
    for path in _paths(tensors, ".lora_A.weight", known):
        a, b = _take(tensors, f"{path}.lora_A.weight"), _take(tensors, f"{path}.lora_B.weight")
        alpha = _pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        scaling = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        for site in known[path]:
            mine = b[site.rows]
            used = (
                mine.any(0) if site.projection_slice and mine.any() else torch.ones(len(a), dtype=torch.bool)
            )
            factors[site] = a[used], mine[:, used], scaling
    factors = _without_idle_parts(factors, lambda factor: not factor[1].any())
    targets, layers = _targets_of(factors, lora.TARGETS, sites)
    rank = max(len(a) for a, _, _ in factors.values())
    scaling = next(iter(factors.values()))[2]
    state: Tensors = {}
    for site, (a, b, own_scaling) in factors.items():
        padding = rank - len(a)
        state[f"adapter.{site.label}.A"] = nn.functional.pad(a, (0, 0, 0, padding))
        state[f"adapter.{site.label}.B"] = nn.functional.pad(b, (0, padding)) * (own_scaling / scaling)
    dropout = float(config.get("lora_dropout", 0.0))
    return lora.LoRA(rank, scaling * rank, targets, dropout=dropout, layers=layers), state


def _without_idle_parts(found: dict[Site, Any], idle: Callable[[Any], bool]) -> dict[Site, Any]:
    """Leave out parts of fused projections that nothing changes in any layer, unless nothing is changed at all."""
    busy = {site.name for site, value in found.items() if not site.projection_slice or not idle(value)}
    return {site: value for site, value in found.items() if site.name in busy} or found


# (IA)³ -------------------------------------------------------------------------------------------------------------


def _write_ia3(adapter: ia3.IA3, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {}
    before: list[str] = []
    transposed = False
    for path, group in _grouped(sites, adapter.layers, adapter.targets).items():
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
    known = _grouped(sites, "all", ia3.TARGETS)
    vectors: dict[Site, Tensor] = {}
    for path in _paths(tensors, ".ia3_l", known):
        scale = _take(tensors, f"{path}.ia3_l")
        side = "input" if scale.shape[0] == 1 else "output"
        here = [site for site in known[path] if site.side == side]
        if not here:
            raise UnsupportedError(f"the file scales the {side} of {path!r}; the toolkit's (IA)³ does not")
        vectors |= {site: scale.flatten()[site.rows if side == "output" else slice(None)] for site in here}
    vectors = _without_idle_parts(vectors, lambda vector: bool((vector == 1).all()))
    targets, layers = _targets_of(vectors, ia3.TARGETS, sites)
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
    known = _grouped(sites, "all", ("attention_heads" if before else "attention_output",))
    gains: dict[Site, Tensor] = {}
    shifts: dict[Site, Tensor] = {}
    for path in _paths(tensors, ".glora_A.X", known):
        [site] = known[path]
        gain, rest, again, behind = (_take(tensors, f"{path}.glora_{name}.X").flatten() for name in "ABDE")
        ahead = _take(tensors, f"{path}.glora_C.{'X' if before else 'zeros'}").flatten()
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
    _, layers = _targets_of(gains, (placement,), sites)
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
    prompt = _take(tensors, _PROMPT)
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
    lora.LoRA: Format("LORA", _write_lora, _read_lora),
    ia3.IA3: Format("IA3", _write_ia3, _read_ia3),
    Hadamard: Format("GLORA", _write_hadamard, _read_hadamard),
    PromptTuning: Format(
        "PROMPT_TUNING", _write_prompt, _read_prompt, before_model="base_model.", before_own="", wraps=False
    ),
}
