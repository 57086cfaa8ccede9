"""Hand trained adapters to stock `peft`, in the files that it reads. `peft` itself is not needed to write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hadamard_toolkit.adapters.attachment import CONFIG, WEIGHTS, Attachment
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.paths import atomic_folder, atomic_write


def export_peft(attachment: Attachment, folder: str | Path) -> None:
    """Write a Hadamard attachment as a stock `peft` folder, norms and head included.

    A' = W ⊙ A + b behind W_O is GLoRA (Chavan et al. 2023), W_eff = W_O + W_O * A + B and
    b_eff = b_O + b_O * D + E + W_O C, with A = D = W − 1, E = b and B = C = 0; before W_O, a bias alone is C = b.
    Load it with `peft.PeftModel.from_pretrained(model, folder)` on the same backbone (peft 0.20 or later).

    Raises `UnsupportedError` for other adapters and for what GLoRA cannot say: column scaling (W before W_O), a
    shift of a projection without bias, projections that are no `nn.Linear` (gpt2), depth steps that share one (albert).
    """
    adapter = attachment.adapter
    if not isinstance(adapter, Hadamard):
        raise UnsupportedError(f"{type(adapter).__name__} has no export to peft; Hadamard has")
    before = adapter.placement == "attention_heads"
    if before and "weight" in adapter.vectors:
        raise UnsupportedError("peft's GLoRA scales rows of W_O, not columns: W before W_O cannot be exported; merge() it")
    if not adapter.vectors:
        raise UnsupportedError("vectors=() inserts no module that peft could hold; save() the norms instead")
    state: dict[str, Tensor] = {}
    targets = []
    for layer in attachment.sites.layers(adapter.layers):
        site = attachment.sites(layer, adapter.placement)
        linear = site.module
        if not isinstance(linear, nn.Linear) or attachment.model.config.model_type == "albert":
            raise UnsupportedError(f"{site.path} of {type(attachment.model).__name__} cannot be wrapped by peft's GLoRA")
        if "bias" in adapter.vectors and linear.bias is None:
            raise UnsupportedError(f"{site.path} has no bias for peft's GLoRA to shift; use vectors=('weight',) or merge()")
        own = attachment.named_parameters("adapter")
        label = f"adapter.layers.{layer}.{adapter.placement}"
        width = linear.out_features
        scale, shift = own.get(f"{label}.weight"), own.get(f"{label}.bias")
        gain = torch.zeros(width) if scale is None else scale.detach().cpu() - 1
        zero = torch.zeros(width)
        values = {
            "glora_A.X": gain[:, None],
            "glora_B.X": zero[:, None],
            "glora_D.X": gain,
            "glora_E.X": zero if shift is None or before else shift.detach().cpu(),
        }
        if before:
            assert shift is not None
            values["glora_C.X"] = shift.detach().cpu()[:, None]
        else:
            values["glora_C.zeros"] = torch.zeros(linear.in_features, 1)
        state |= {f"{site.path}.{name}": value for name, value in values.items()}
        targets.append(site.path)
    norms = {t.path: p for t, p in zip(attachment.tunings, attachment.named_parameters("norm").values(), strict=True)}
    head = {name.removeprefix("head."): p for name, p in attachment.named_parameters("head").items()}
    saved = {name.rpartition(".")[0] for name in norms | head}
    state |= {name: parameter.detach().cpu() for name, parameter in (norms | head).items()}
    config = {
        "peft_type": "GLORA",
        "task_type": None,
        "config_A_B": "vector",
        "config_C": "vector" if before else "none",
        "config_D_E": "vector",
        "bias": "none",
        "r": 8,
        "init_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "target_modules": targets,
        "modules_to_save": sorted(saved),
    }
    with atomic_folder(Path(folder)) as staging:
        atomic_write(staging / CONFIG, json.dumps(config, indent=2) + "\n")
        tensors = {f"base_model.model.{name}": value.contiguous().clone() for name, value in state.items()}
        save_file(tensors, staging / WEIGHTS)
