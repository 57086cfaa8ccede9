"""Attach an adapter to a model, train, count, save, merge, and leave no trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import hadamard_toolkit.adapters.hadamard
import hadamard_toolkit.adapters.tuning  # noqa: F401  (registers)
from hadamard_toolkit.adapters.base import ROLES, Adapter, Insertion, Tuning, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.errors import ArgumentError, DataError, check_choice
from hadamard_toolkit.paths import atomic_folder, atomic_write
from hadamard_toolkit.sites import Sites, head_parameters, unshare, untie

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HOME = "hadamard_attachment"  # the submodule of the model that holds the adapter's modules
FORMAT = 1


class Attachment:
    """An adapter at work on a model. Made by `attach`; `detach` restores the model bit for bit.

    Attributes: `model`, `adapter` (the dataclass), `sites`, `seed`, `tunings` (the backbone's own trained parameters).
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, *, seed: int = 0) -> None:
        if hasattr(model, _HOME):
            raise ArgumentError("model already carries an adapter; call detach() or merge() first")
        if not isinstance(adapter, Adapter):
            raise ArgumentError(f"adapter={adapter!r} is not an adapter; give an instance such as Hadamard()")
        self.model, self.adapter, self.seed = model, adapter, seed
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._reshare: Callable[[], None] | None = unshare(model)
        try:
            self._declare()
        except BaseException:
            if self._reshare:
                self._reshare()
            raise
        self._fingerprint = _fingerprint(self.sites)
        self._head = head_parameters(model)
        self._originals = {name: p.detach().clone() for name, p in self._head.items()}
        self._originals |= {t.path: self._tuned[t.label].detach().clone() for t in self.tunings}
        home = nn.Module()
        for label, insertion in self._insertions.items():
            _nest(home, label, insertion.module)
        model.requires_grad_(False)
        model.add_module(_HOME, home)
        self._handles: list[Any] = []
        self._merged = False
        self._folded: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}  # what merge() changed, as it was
        self._wire()
        self.train_only(*ROLES)

    def _declare(self) -> None:
        self.sites = Sites(self.model)
        self._insertions: dict[str, Insertion] = {}
        self.tunings: list[Tuning] = []
        self._tuned: dict[str, nn.Parameter] = {}
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(self.seed)
            for declared in self.adapter.declare(self.sites):
                if isinstance(declared, Tuning):
                    if declared.label not in self._tuned:
                        self.tunings.append(declared)
                        self._tuned[declared.label] = self.model.get_parameter(declared.path)
                    continue
                site = declared.site
                label, copies = f"layers.{site.layer}.{site.name}", 1
                while label in self._insertions:
                    copies += 1
                    label = f"layers.{site.layer}.{site.name}_{copies}"
                if device.type != "meta":
                    declared.module.to(device)
                self._insertions[label] = declared

    def _wire(self, off: frozenset[int] = frozenset()) -> None:
        for handle in self._handles:
            handle.remove()
        active = (i for i in self._insertions.values() if i.site.layer not in off)
        self._handles = [handle for insertion in active for handle in insertion.connect()]

    # parameters ------------------------------------------------------------------------------------------------

    def named_parameters(self, role: str | None = None) -> dict[str, nn.Parameter]:
        """Parameters of the adapter and what trains with it, by name; of one `role`, or of all four.

        Names begin with the role: `adapter.layers.3.attention_output.weight`, `norm.layers.3.attention_norm.bias`,
        `head.classifier.weight`.
        """
        if role is not None:
            check_choice("role", role, ROLES)
        found: dict[str, nn.Parameter] = {}
        for label, insertion in self._insertions.items():
            for name, parameter in insertion.module.named_parameters():
                kind = "gate" if name in insertion.module.gates else "adapter"
                found[f"{kind}.{label}.{name}"] = parameter
        found |= {f"{t.role}.{t.label}": self._tuned[t.label] for t in self.tunings}
        found |= {f"head.{name}": parameter for name, parameter in self._head.items()}
        return {name: p for name, p in found.items() if role is None or name.startswith(f"{role}.")}

    def parameters(self, role: str | None = None) -> list[nn.Parameter]:
        """The same as a list, each tensor once (tied norms are one tensor)."""
        return list({id(p): p for p in self.named_parameters(role).values()}.values())

    def train_only(self, *roles: str) -> None:
        """Let exactly the parameters of `roles` train."""
        for role in roles:
            check_choice("role", role, ROLES)
        for role in ROLES:
            for parameter in self.parameters(role):
                parameter.requires_grad_(role in roles)

    def count(self) -> pd.DataFrame:
        """Parameters by role (rows adapter, norm, gate, head): `trained` now, `stored` by save, `nonzero` allowed.

        `nonzero` counts the entries that no mask forces to zero, whatever their value is. Works on the meta device.
        """
        rows = {}
        for role in ROLES:
            own = self.parameters(role)
            stored = sum(p.numel() for p in own)
            rows[role] = {"trained": sum(p.numel() for p in own if p.requires_grad), "stored": stored, "nonzero": stored}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("role")

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of all parameters, by the names of `named_parameters`."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set parameters from `state`; names that are missing keep their values, unknown names and shapes are refused."""
        own = self.named_parameters()
        for name, value in state.items():
            if name not in own:
                raise DataError(f"{name!r} is not a parameter of this attachment of {self.adapter}")
            if own[name].shape != value.shape:
                raise DataError(f"{name!r} has shape {tuple(value.shape)}; this model needs {tuple(own[name].shape)}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def vectors(self) -> dict[str, np.ndarray]:
        """Vector parameters stacked over layers: `{"attention_output.weight": array [layers, width], …}`.

        Rows of layers that carry none are NaN, so that runs with different `layers` line up.
        """
        return stack_vectors(self.state_dict(), len(self.sites))

    # on and off ------------------------------------------------------------------------------------------------

    @contextmanager
    def enabled(self, on: bool = True, *, layers: str | tuple[int, ...] = "all") -> Iterator[None]:
        """`with attachment.enabled(False):` the backbone is as it was before, with the head as it is now.

        `layers` limits it to some layers: their insertions are bypassed and their norms have their old values.
        """
        if on:
            yield
            return
        off = frozenset(self.sites.layers(layers))
        tunings = [t for t in self.tunings if layers == "all" or t.layer in off]
        trained = {t.label: self._tuned[t.label].detach().clone() for t in tunings}
        try:
            self._wire(off)
            self._set({t.label: self._originals[t.path] for t in tunings})
            yield
        finally:
            self._set(trained)
            self._wire()

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for label, value in values.items():
                self._tuned[label].copy_(value)

    # leaving ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Fold every insertion into the backbone's weights and return the plain model: no cost at inference.

        Exact up to rounding (computed in float64, cast once). A projection without a bias gains one where the
        adapter has a shift. A layer-sharing model (ALBERT) is untied first, as its steps now differ.
        `detach` still restores the model as it was.
        """
        if self._merged:
            return self.model
        for insertion in self._insertions.values():
            insertion.module.check_fold(insertion.site)
        if self._reshare:
            untie(self.model)
        for insertion in self._insertions.values():
            host = insertion.site.module
            if not self._reshare:
                bias = host.bias
                kept = (host.weight.detach().clone(), None if bias is None else bias.detach().clone())  # type: ignore[operator]
                self._folded.setdefault(host, kept)
            insertion.module.fold(insertion.site)
        self._wire(frozenset(range(len(self.sites))))
        delattr(self.model, _HOME)
        self._merged = True
        return self.model

    @torch.no_grad()
    def detach(self) -> PreTrainedModel:
        """Take the adapter off and restore the model bit for bit: weights, head, state-dict keys, requires_grad."""
        if self._merged:
            for host, (weight, bias) in self._folded.items():
                host.weight.copy_(weight)  # type: ignore[operator]
                if bias is None:
                    host.bias = None
                else:
                    host.bias.copy_(bias)  # type: ignore[operator]
        else:
            self._wire(frozenset(range(len(self.sites))))
            delattr(self.model, _HOME)
        for name, parameter in self._head.items():
            parameter.copy_(self._originals[name])
        self._set({t.label: self._originals[t.path] for t in self.tunings})
        if self._reshare:
            self._reshare()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        self._insertions, self.tunings, self._merged = {}, [], False
        return self.model

    def save(self, folder: str | Path) -> None:
        """Write adapter, norms, gates and head to `folder`: `adapter_config.json` and `adapter_model.safetensors`."""
        config = {
            "format": FORMAT,
            "adapter": adapter_to_dict(self.adapter),
            "seed": self.seed,
            "backbone": {
                "model_type": self.model.config.model_type,
                "layers": len(self.sites),
                "fingerprint": self._fingerprint,
            },
            "head": type(self.model).__name__,
        }
        target = Path(folder)
        text = json.dumps(config, indent=2) + "\n"
        if target.is_dir():  # a run's folder that holds more than the adapter
            atomic_write(target / CONFIG, text)
            save_file(self.state_dict(), target / WEIGHTS)
            return
        with atomic_folder(target) as staging:
            atomic_write(staging / CONFIG, text)
            save_file(self.state_dict(), staging / WEIGHTS)


def attach(model: PreTrainedModel, adapter: Adapter, *, seed: int = 0) -> Attachment:
    """Attach `adapter` to `model`: the backbone is frozen, the adapter, its norms and the head train.

    `seed` fixes the adapter's initial values, whatever the global generators did before; they are left untouched.
    Raises `ArgumentError` for layers or sites that the model lacks, `UnsupportedError` for an architecture without
    a table of sites or one that cannot host the method.
    """
    return Attachment(model, adapter, seed=seed)


def load_attachment(model: PreTrainedModel, folder: str | Path, *, strict: bool = True) -> Attachment:
    """Attach what `Attachment.save` wrote to `folder`, head included.

    With `strict`, a backbone other than the one it was trained on is refused; shapes must fit in any case.
    """
    config = read_config(folder)
    attachment = attach(model, adapter_from_dict(config["adapter"]), seed=config["seed"])
    try:
        found, expected = attachment._fingerprint, config["backbone"]["fingerprint"]
        if strict and found != expected:
            raise DataError(
                f"folder={str(folder)!r} was trained on another backbone (fingerprint {expected}, this model has "
                f"{found}); load that backbone, or pass strict=False to transplant"
            )
        attachment.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except BaseException:
        attachment.detach()
        raise
    return attachment


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a saved attachment; one clear error for a folder that is none."""
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"folder={str(folder)!r} holds no saved attachment ({CONFIG} is missing)") from None
    except ValueError as error:
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is not valid JSON: {error}") from None
    if config.get("format") != FORMAT:
        kind = "a stock peft adapter" if "peft_type" in config else f"format {config.get('format')!r}"
        raise DataError(f"folder={str(folder)!r} holds {kind}; load_attachment reads format {FORMAT} of this toolkit")
    return config


def stack_vectors(state: dict[str, Tensor], layers: int) -> dict[str, np.ndarray]:
    """Stack the one-dimensional adapter and norm tensors of a state over `layers`; see `Attachment.vectors`."""
    stacked: dict[str, np.ndarray] = {}
    for name, value in state.items():
        role, kind, *rest = name.split(".", 3)
        if role in ("adapter", "norm") and kind == "layers" and value.ndim == 1:
            layer, label = int(rest[0]), rest[1]
            if label not in stacked:
                stacked[label] = np.full((layers, value.numel()), np.nan, dtype=np.float32)
            stacked[label][layer] = value.float().numpy()
    return stacked


def _nest(home: nn.Module, label: str, module: nn.Module) -> None:
    *parents, name = label.split(".")
    for parent in parents:
        if not hasattr(home, parent):
            home.add_module(parent, nn.Module())
        home = home.get_submodule(parent)
    home.add_module(name, module)


def _fingerprint(sites: Sites) -> str:
    """16 hex digits from names, shapes and first values (in bfloat16) of the base model's tensors."""
    digest = sha256()
    for name, parameter in sites.base_parameters().items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:32].to(torch.bfloat16).view(torch.int16)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
