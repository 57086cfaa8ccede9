"""LoRA in stock `peft`'s files."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters import lora
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.interop.peft_tensors import (
    Tensors,
    grouped,
    paths_of,
    take,
    targets_of,
    without_idle_slices,
)
from hadamard_toolkit.sites import Site, Sites, features


def write_lora(adapter: lora.LoRA, sites: Sites, own: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Config entries and tensors of `adapter`; the n targets of a fused projection become one factor of rank n·r."""
    if adapter.gated:
        raise UnsupportedError("peft's LoRA has no gates: a gated LoRA cannot be exported")
    tensors: Tensors = {}
    ranks, alphas, transposed = {}, {}, False
    for path, group in grouped(sites, adapter.layers, adapter.targets).items():
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
    """The value of the first of `patterns` that fits the end of `path`, as peft reads them."""
    values = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path))
    return next(values, default)


# Initial values that leave the base weights alone: what was trained is then A and B, wherever they started.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Entries of peft's config that say where a LoRA is, how it is trained, or what its tensors say too. Any other entry
# that is set makes it another function.
_NO_OTHER_FUNCTION = """
peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode init_lora_weights r
lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora target_modules exclude_modules modules_to_save
layers_to_transform layers_pattern fan_in_fan_out bias use_dora lora_bias target_parameters trainable_token_indices
megatron_core runtime_config ensure_weight_tying qalora_group_size eva_config corda_config lora_ga_config loftq_config
velora_config
"""


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
        if value and name not in _NO_OTHER_FUNCTION.split():
            raise UnsupportedError(f"a LoRA with {name}={value!r} is another function: it cannot be imported")


def read_lora(config: dict[str, Any], tensors: Tensors, sites: Sites) -> tuple[Adapter, Tensors]:
    """The adapter and its parameters; a smaller rank is padded to the largest with zeros."""
    _check_lora(config)
    known = grouped(sites, "all", lora.TARGETS)
    factors: dict[Site, tuple[Tensor, Tensor, float]] = {}
    for path in paths_of(tensors, ".lora_A.weight", known):
        a, b = take(tensors, f"{path}.lora_A.weight"), take(tensors, f"{path}.lora_B.weight")
        alpha = _pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        scaling = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        for site in known[path]:
            mine = b[site.rows]
            used = (
                mine.any(0) if site.projection_slice and mine.any() else torch.ones(len(a), dtype=torch.bool)
            )
            factors[site] = a[used], mine[:, used], scaling
    factors = without_idle_slices(factors, lambda factor: not factor[1].any())
    targets, layers = targets_of(factors, lora.TARGETS, sites)
    rank = max(len(a) for a, _, _ in factors.values())
    scaling = next(iter(factors.values()))[2]
    state: Tensors = {}
    for site, (a, b, own_scaling) in factors.items():
        padding = rank - len(a)
        state[f"adapter.{site.label}.A"] = nn.functional.pad(a, (0, 0, 0, padding))
        state[f"adapter.{site.label}.B"] = nn.functional.pad(b, (0, padding)) * (own_scaling / scaling)
    dropout = float(config.get("lora_dropout", 0.0))
    return lora.LoRA(rank, scaling * rank, targets, dropout=dropout, layers=layers), state
