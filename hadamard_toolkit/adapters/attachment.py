"""Attach an adapter to a model, train, count, save, merge, and leave no trace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.base import ROLES, Adapter, Insertion, adapter_to_dict
from hadamard_toolkit.adapters.declaring import declare
from hadamard_toolkit.adapters.files import FORMAT, stack_vectors, write_attachment
from hadamard_toolkit.adapters.fingerprint import describe_backbone
from hadamard_toolkit.adapters.masking import Kept, Masking
from hadamard_toolkit.adapters.merging import Merge
from hadamard_toolkit.adapters.wiring import HOME, Wiring
from hadamard_toolkit.errors import ArgumentError, DataError, check_choice
from hadamard_toolkit.sites import Sites, check_model, head_parameters, position_limit
from hadamard_toolkit.unsharing import unshare


class Attachment:
    """An adapter at work on a model. Made by `attach`; `detach` restores the model bit for bit.

    Attributes
    ----------
    model, adapter, seed: what `attach` was called with.
    sites: the sites of the model.
    insertions: the adapter's modules at their sites, by the label that stands in the names of their parameters.
    tunings: the parameters of the backbone that train.
    masking: the masks at work, or None.
    task: the name of the task that it was trained on, or None.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, *, seed: int = 0) -> None:
        check_model(model)
        if hasattr(model, HOME):
            raise ArgumentError("model already carries an adapter; call detach() or merge() first")
        if not isinstance(adapter, Adapter):
            raise ArgumentError(f"adapter={adapter!r} is not an adapter; give an instance such as Hadamard()")
        self.model, self.adapter, self.seed = model, adapter, seed
        self.task: str | None = None
        # The names in the model's config, once `name_labels` has replaced them.
        self._label_names: tuple[Any, Any] | None = None
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._unshared = unshare(model)
        try:
            self.sites = Sites(model)
            declared = declare(adapter, self.sites, seed)
        except BaseException:
            if self._unshared:
                self._unshared.undo()
            raise
        self.insertions, self.tunings, self._tuned = declared.insertions, declared.tunings, declared.tuned
        self._head = head_parameters(model)
        self._originals = {name: p.detach().clone() for name, p in self._head.items()}
        self._originals |= {t.path: self._tuned[t.label].detach().clone() for t in self.tunings}
        model.requires_grad_(False)
        self._wiring = Wiring(self.sites, self.insertions)
        self._detached = False
        self._merge: Merge | None = None
        self.masking: Masking | None = None
        self.train_only(*ROLES)

    def _check_attached(self) -> None:
        if self._detached:
            raise ArgumentError(
                f"this attachment of {self.adapter} is detached: the model is without it; attach() it again"
            )

    # parameters ------------------------------------------------------------------------------------------------

    def named_parameters(self, role: str | None = None) -> dict[str, nn.Parameter]:
        """Parameters of the adapter and what trains with it, by name; of one `role`, or of all four.

        Names begin with the role: `adapter.layers.3.attention_output.weight`, `norm.layers.3.attention_norm.bias`,
        `head.classifier.weight`.
        """
        if role is not None:
            check_choice("role", role, ROLES)
        self._check_attached()
        parameters = {
            _full_name(label, insertion, name): parameter
            for label, insertion in self.insertions.items()
            for name, parameter in insertion.module.named_parameters()
        }
        parameters |= self._parameters_of_model()
        return {name: p for name, p in parameters.items() if role is None or name.startswith(f"{role}.")}

    def _parameters_of_model(self) -> dict[str, nn.Parameter]:
        """The parameters of the model itself that train: those tuned in the backbone, and the head."""
        tuned = {f"{t.role}.{t.label}": self._tuned[t.label] for t in self.tunings}
        return tuned | {f"head.{name}": parameter for name, parameter in self._head.items()}

    def parameters(self, role: str | None = None) -> list[nn.Parameter]:
        """The same as a list, each tensor once (a norm that layers share is one tensor)."""
        return list({id(p): p for p in self.named_parameters(role).values()}.values())

    def train_only(self, *roles: str) -> None:
        """Let the parameters of `roles` train and no others."""
        for role in roles:
            check_choice("role", role, ROLES)
        for role in ROLES:
            for parameter in self.parameters(role):
                parameter.requires_grad_(role in roles)
        for insertion in self.insertions.values():
            for name in insertion.module.frozen:
                insertion.module.get_parameter(name).requires_grad_(False)

    def count(self) -> pd.DataFrame:
        """Numbers of parameters by role (rows adapter, norm, gate, head).

        Columns: `trained` now; `stored` by `save`; `nonzero`, the entries that no mask forces to zero, whatever their
        value is (`save` writes only these, so the two are equal). It works on the meta device.
        """
        rows = {}
        removed = self.masking.removed() if self.masking else {}
        for role in ROLES:
            trained = sum(p.numel() for p in self.parameters(role) if p.requires_grad)
            sizes = {id(p): p.numel() for name, p in self._stored().items() if name.startswith(f"{role}.")}
            stored = sum(sizes.values()) - sum(
                n for name, n in removed.items() if name.startswith(f"{role}.")
            )
            rows[role] = {"trained": trained, "stored": stored, "nonzero": stored}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("role")

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of all parameters, by the names of `named_parameters`."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters().items()}

    def stored_state(self) -> dict[str, Tensor]:
        """Copies on the CPU of what `save` writes: `state_dict`, with prefixes in place of their network."""
        return {name: value.detach().cpu().clone() for name, value in self._stored().items()}

    def _stored(self) -> dict[str, Tensor]:
        self._check_attached()
        stored = {
            _full_name(label, insertion, name): value
            for label, insertion in self.insertions.items()
            for name, value in insertion.module.stored().items()
        }
        return stored | self._parameters_of_model()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set parameters from `state`, a `state_dict` or a `stored_state`; names that it lacks keep their values.

        A part that has two forms takes the one of `state`. Raises `DataError` for unknown names and wrong shapes.
        """
        for label, insertion in self.insertions.items():
            pieces = [name.partition(f".{label}.") for name in state]
            insertion.module.take_form(
                {name for role, _, name in pieces if role in ("adapter", "gate") and name}
            )
        parameters = self.named_parameters()
        for name, value in state.items():
            if name not in parameters:
                raise DataError(f"{name!r} is not a parameter of this attachment of {self.adapter}")
            needed = parameters[name].shape
            if needed != value.shape:
                raise DataError(f"{name!r} has shape {tuple(value.shape)}; this model needs {tuple(needed)}")
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
        if self.masking:
            self.masking.enforce()

    # masks -----------------------------------------------------------------------------------------------------

    def mask(self, kept: Kept, record: dict[str, Any]) -> None:
        """Set entries to zero and keep them there: `kept` has a bool tensor by parameter name, True where one stays.

        `record` says how the masks were made and is saved with them. `hadamard_toolkit.sparsity` makes both.
        """
        self._check_attached()
        if self.masking:
            raise ArgumentError("this attachment has masks already; remove() them first")
        if self._merge:
            raise ArgumentError("this attachment is merged; masks must be there before merge()")
        self.masking = Masking(self.named_parameters(), kept, record)

    def unmask(self) -> None:
        """Remove the masks: entries get back the values that they had when they were removed."""
        if self._merge:
            raise ArgumentError(
                "this attachment is merged: its masks are folded in; detach() restores the model"
            )
        if self.masking:
            self.masking.release(restore=True)
            self.masking = None

    def vectors(self) -> dict[str, np.ndarray]:
        """Vector parameters stacked over layers: `{"attention_output.weight": array [layers, width], …}`.

        Rows of layers without such a vector are NaN, so that runs with different `layers` line up.
        """
        return stack_vectors(self.stored_state(), len(self.sites))

    # on and off ------------------------------------------------------------------------------------------------

    @contextmanager
    def enabled(self, on: bool = True, *, layers: str | tuple[int, ...] = "all") -> Iterator[None]:
        """`with attachment.enabled(False):` the backbone is as it was before `attach`; the head stays as it is.

        `layers` limits this to some layers: their insertions are off and their norms have their old values.
        """
        self._check_attached()
        if on:
            yield
            return
        off: set[int | None] = {*self.sites.layers(layers), *([None] if layers == "all" else [])}
        insertions = [label for label, insertion in self.insertions.items() if insertion.site.layer in off]
        with self.without(insertions, [t.label for t in self.tunings if layers == "all" or t.layer in off]):
            yield

    @contextmanager
    def without(self, insertions: Collection[str], tunings: Collection[str]) -> Iterator[None]:
        """In the block, the `insertions` and `tunings` with these labels are off; `parts_of` has them by layer."""
        originals = {t.label: self._originals[t.path] for t in self.tunings if t.label in tunings}
        trained = {label: self._tuned[label].detach().clone() for label in originals}
        try:
            self._wiring.connect(off=insertions)
            self._set(originals)
            yield
        finally:
            self._set(trained)
            self._wiring.connect()

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for label, value in values.items():
                self._tuned[label].copy_(value)

    # leaving ---------------------------------------------------------------------------------------------------

    def merge(self, *, allow_new_biases: bool = False) -> PreTrainedModel:
        """Fold every insertion into the backbone's weights and return the plain model: no cost at inference.

        This is exact up to rounding (computed in float64, rounded once), and `save_pretrained` and `from_pretrained`
        keep it. Where a projection without a bias needs one, the config's switch for biases is set (llama, modernbert:
        `attention_bias`). A model whose layers share weights (ALBERT) becomes one without sharing, since its steps now
        differ. `detach` still restores the model.

        Raises `UnsupportedError`, before anything is changed, for adapters that are not linear and where a projection
        needs a bias that the architecture does not have (t5). With `allow_new_biases=True` such projections get biases
        all the same: the model in memory then has the logits of the adapter, but one that is loaded from its files
        does not, since the architecture drops these biases.
        """
        self._check_attached()
        if self._merge is None:
            merge = Merge(self.sites, self.insertions.values(), allow_new_biases=allow_new_biases)
            if self._unshared:
                self._unshared.untie()
            merge.fold()
            self._wiring.remove()
            self._merge = merge
        return self.model

    @torch.no_grad()
    def detach(self) -> PreTrainedModel:
        """Remove the adapter and restore the model bit for bit: weights, head, state-dict keys, requires_grad."""
        self._check_attached()
        if self._merge:
            self._merge.undo()
        else:
            self._wiring.remove()
        for name, parameter in self._head.items():
            parameter.copy_(self._originals[name])
        if self.masking:
            self.masking.release(restore=False)
        self._set({t.label: self._originals[t.path] for t in self.tunings})
        if self._unshared:
            self._unshared.undo()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        if self._label_names:
            self.model.config.id2label, self.model.config.label2id = self._label_names
        self.insertions, self.tunings, self._merge, self.masking = {}, [], None, None
        self._detached = True
        return self.model

    def save(self, folder: str | Path) -> None:
        """Write adapter, norms, gates and head to `folder`: `adapter_config.json` and `adapter_model.safetensors`.

        All of it is written or nothing: a save that fails leaves what was there. The config also has the names of the
        labels, the task and the backbone where they are known. With masks, only the kept entries are written, with
        `masks.safetensors` and `masks.json` beside them; `read_state` restores the full tensors.

        Raises `ArgumentError` after `merge` or `detach` and for an empty `folder`, `StoreError` where the folder cannot
        be written to.
        """
        self._check_attached()
        if self._merge:
            raise ArgumentError(
                "this attachment is merged, so there is no adapter to save; save() before merge(), or keep the merged "
                "model with its save_pretrained()"
            )
        config = {
            "format": FORMAT,
            "adapter": adapter_to_dict(self.adapter),
            "seed": self.seed,
            "backbone": describe_backbone(self.model.config, len(self.sites), self.untrained_base()),
            "head": type(self.model).__name__,
            "task": self.task,
            "labels": self.labels,
            "masks": self.masking is not None,
        }
        write_attachment(folder, config, self.stored_state(), self.masking)

    def untrained_base(self) -> dict[str, Tensor]:
        """The parameters of the base model as they were before training."""
        originals = {id(self._tuned[t.label]): self._originals[t.path] for t in self.tunings}
        return {name: originals.get(id(p), p) for name, p in self.sites.base_parameters().items()}

    # what the model is for -------------------------------------------------------------------------------------

    @property
    def labels(self) -> list[str] | None:
        """The names of the head's outputs in the model's config, or None where it only numbers them."""
        named: dict[int, str] = self.model.config.id2label or {}  # type: ignore[assignment]
        names = [str(named[index]) for index in sorted(named)]
        return None if names == [f"LABEL_{index}" for index in range(len(names))] else names

    def name_labels(self, labels: Sequence[str], task: str | None = None) -> None:
        """Name the head's outputs in the model's config, where a `transformers` pipeline finds them."""
        self._check_attached()
        self.task = task or self.task
        config = self.model.config
        if labels and len(labels) == config.num_labels:
            if self._label_names is None:
                self._label_names = config.id2label, config.label2id
            config.id2label = dict(enumerate(labels))
            config.label2id = {name: index for index, name in enumerate(labels)}

    def longest_input(self) -> int | None:
        """The longest input in tokens that the model takes with this adapter, or None if there is no limit."""
        limit = position_limit(self.model)
        added = sum(insertion.module.added for insertion in self.insertions.values())
        return None if limit is None else limit - added


def attach(model: PreTrainedModel, adapter: Adapter, *, seed: int = 0) -> Attachment:
    """Attach `adapter` to `model`: the backbone is frozen, the adapter, its norms and the head train.

    `seed` decides the adapter's initial values; the global random generators are neither read nor changed.
    Raises `ArgumentError` for layers or sites that the model lacks, `UnsupportedError` for an architecture that has no
    table of sites or cannot carry the method.
    """
    return Attachment(model, adapter, seed=seed)


def _full_name(label: str, insertion: Insertion, name: str) -> str:
    return f"{'gate' if name in insertion.module.gates else 'adapter'}.{label}.{name}"
