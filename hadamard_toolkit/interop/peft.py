"""Hand adapters to stock `peft` and take them back, in the files that it reads and writes; it need not be installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.attachment import Attachment, attach
from hadamard_toolkit.adapters.base import Adapter, norm_tunings
from hadamard_toolkit.adapters.files import CONFIG, WEIGHTS, read_tensors
from hadamard_toolkit.adapters.stack import Stack
from hadamard_toolkit.adapters.tuning import LayerNormTuning
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.interop.peft_formats import BEFORE, FORMATS, with_norm
from hadamard_toolkit.interop.peft_tensors import Tensors
from hadamard_toolkit.paths import atomic_files
from hadamard_toolkit.sites import Sites, check_model, head_parameters

_NORM = "ln_tuning_layers"
_KNOWN = {known.peft_type: known for known in FORMATS.values()}


def export_peft(attachment: Attachment, folder: str | Path) -> None:
    """Write a LoRA, (IA)³, LayerNorm, prompt or Hadamard attachment as a stock `peft` folder, norms and head included.

    Load it with `peft.PeftModel.from_pretrained(model, folder)` on the same backbone: the logits are the same. A
    `Stack` of one of them and `LayerNormTuning` goes too. Fused projections become one wider factor or vector.
    Hadamard is GLoRA there (Chavan et al. 2023; peft 0.20 or later). A prompt stands in front of everything in peft,
    and its rows stay in what the head reads: the logits are the same where the head reads the base model's pooler
    (bert, albert), and in causal models on inputs without padding on the right, which a warning says.

    Raises `UnsupportedError` for other adapters and for what peft cannot say: gates, W before W_O (column scaling), a
    shift of a projection without bias, GLoRA on projections that are no `nn.Linear` (gpt2), depth steps that share one
    module (albert), a prompt behind [CLS] or under a head that counts positions.
    """
    body = _body(attachment.adapter)
    own_format = FORMATS[type(body)] if body else None
    if own_format is None or own_format.wraps or attachment.tunings:
        _check_steps(attachment.model)
    state = attachment.state_dict()
    norms = {t.path: state[f"norm.{t.label}"] for t in attachment.tunings}
    saved = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    if own_format is None:
        config: dict[str, Any] = {"target_modules": sorted({name.rpartition(".")[0] for name in norms})}
        peft_type, before_model, before_own = "LN_TUNING", BEFORE, BEFORE
        tensors = {f".{_NORM}.".join(name.rsplit(".", 1)): value for name, value in norms.items()}
    else:
        peft_type, before_model = own_format.peft_type, own_format.before_model
        before_own = own_format.before_own
        config, tensors = own_format.write(body, attachment.sites, state)
        saved |= norms
    config = {
        "peft_type": peft_type,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        **config,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}),
    }
    named = {before_own + name: value for name, value in tensors.items()}
    named |= {before_model + name: value for name, value in saved.items()}
    weights = save({name: value.contiguous().clone() for name, value in named.items()})
    files: dict[str, bytes | str] = {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2) + "\n"}
    atomic_files(Path(folder).expanduser(), files)


def import_peft(model: PreTrainedModel, folder: str | Path, *, seed: int = 0) -> Attachment:
    """Attach what stock `peft` saved in `folder` (`save_pretrained`, or `export_peft`), with the same function.

    Reads LoRA, (IA)³, LayerNorm tuning, prompts, and GLoRA where it is a Hadamard adapter; norms and heads in
    `modules_to_save` come along, and a file without a head leaves the model's as it is. A LoRA on a fused projection
    becomes one on each of its parts. Only safetensors are read. `seed` fills what the file leaves open. A LoRA whose
    initialisation changed the backbone (PiSSA, OLoRA, CorDA, LoftQ) is refused: its files do not say by how much.

    Raises `ArgumentError` for a folder that holds no such files, `UnsupportedError` for methods and tensors that the
    toolkit has no equal for, `DataError` for files that do not fit the model.
    """
    check_model(model)
    config, tensors = _read(Path(folder).expanduser())
    own_format = _KNOWN.get(config["peft_type"])
    head, norms = _saved(model, tensors, tuning=own_format is None)
    if own_format is None or own_format.wraps or norms:
        _check_steps(model)
    sites = Sites(model)
    adapter: Adapter | None = None
    state: Tensors = {}
    if own_format is not None:
        adapter, state = own_format.read(config, tensors, sites)
    if norms:
        norm_adapter, norm_state = _norm_tuning(sites, norms)
        state |= norm_state
        joint = with_norm(adapter, norm_adapter.norm, norm_adapter.layers) if adapter else norm_adapter
        adapter = joint or Stack(*([adapter] if adapter else []), norm_adapter)
    if tensors:
        raise UnsupportedError(
            f"the toolkit has no place for {sorted(tensors)[0]!r} in folder={str(folder)!r}"
        )
    if adapter is None:
        raise DataError(f"folder={str(folder)!r} holds no tensors of an adapter")
    attachment = attach(model, adapter, seed=seed)
    try:
        attachment.load_state_dict(state | {f"head.{name}": value for name, value in head.items()})
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _body(adapter: Adapter) -> Adapter | None:
    """The one part that peft has a method for; None if there is nothing but norms."""
    parts = adapter.adapters if isinstance(adapter, Stack) else (adapter,)
    others = [part for part in parts if not isinstance(part, LayerNormTuning)]
    if len(others) > 1 or any(type(part) not in FORMATS for part in others):
        known = ", ".join(sorted(kind.__name__ for kind in (*FORMATS, LayerNormTuning)))
        raise UnsupportedError(
            f"{adapter} has no export to peft; {known} have, and one of them in a Stack with norms"
        )
    return others[0] if others else None


def _check_steps(model: PreTrainedModel) -> None:
    if model.config.model_type == "albert":
        raise UnsupportedError(
            "albert's depth steps share one module: a step's own adapter cannot be wrapped by peft"
        )


def _read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"folder={str(folder)!r} holds no peft adapter ({CONFIG} is missing)") from None
    except ValueError as error:
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ArgumentError(f"folder={str(folder)!r} holds no peft adapter: {CONFIG} has no peft_type")
    known = [*_KNOWN, "LN_TUNING"]
    if config["peft_type"] not in known:
        raise UnsupportedError(
            f"peft_type {config['peft_type']!r} cannot be imported; {', '.join(known)} can"
        )
    if not (folder / WEIGHTS).is_file():
        raise ArgumentError(
            f"folder={str(folder)!r} holds no {WEIGHTS} (a pickled adapter_model.bin is never read)"
        )
    own_format = _KNOWN.get(config["peft_type"])
    before = own_format.before_model if own_format else BEFORE
    return config, {
        name.removeprefix(before): value for name, value in read_tensors(folder / WEIGHTS).items()
    }


def _saved(model: PreTrainedModel, tensors: Tensors, *, tuning: bool) -> tuple[Tensors, Tensors]:
    """Take the head's and the backbone's own parameters out of `tensors`."""
    if tuning:
        for name in [name for name in tensors if f".{_NORM}." in name]:
            tensors[name.replace(f".{_NORM}.", ".")] = tensors.pop(name)
    parameters = dict(model.named_parameters())
    own = {name: tensors.pop(name) for name in list(tensors) if name in parameters}
    head = {name: own.pop(name) for name in head_parameters(model) if name in own}
    return head, own


def _norm_tuning(sites: Sites, norms: Tensors) -> tuple[LayerNormTuning, Tensors]:
    """The LayerNormTuning whose parameters are exactly `norms`, and these by their names in it."""
    for norm in ("attention", "output", "both"):
        declared = {layer: list(norm_tunings(sites, (layer,), norm)) for layer in sites.layers()}
        layers = tuple(
            layer for layer, parts in declared.items() if all(part.path in norms for part in parts)
        )
        state = {f"norm.{part.label}": norms[part.path] for layer in layers for part in declared[layer]}
        if len(state) == len(norms):
            return LayerNormTuning(norm, "all" if len(layers) == len(sites) else layers), state
    raise UnsupportedError(
        f"the file trains {sorted(norms)[0]!r} and {len(norms) - 1} more of the backbone: no LayerNormTuning does"
    )
