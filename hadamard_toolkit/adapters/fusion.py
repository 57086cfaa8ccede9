"""AdapterFusion (Pfeiffer et al. 2021): attention over frozen adapters of single tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hadamard_toolkit.adapters import attachment as attachments
from hadamard_toolkit.adapters.base import (
    Adapter,
    Declared,
    Insertion,
    SiteModule,
    adapter_from_dict,
    register,
)
from hadamard_toolkit.adapters.bottleneck import ACTIVATIONS, Bottleneck, Pfeiffer
from hadamard_toolkit.adapters.fields import Layers, all_layers, checked, number, one_of, whole
from hadamard_toolkit.adapters.files import read_config, read_state
from hadamard_toolkit.adapters.fingerprint import check_backbone
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.sites import Sites


class Fusion(SiteModule):
    """h + Σ_t s_t V z_t with s = softmax_t(Q x · K z_t), where z_t is what the frozen adapter of task t adds to x.

    x is what those adapters read (`inputs`, or `hidden` itself). Q, K and V are [width, width].
    """

    projections = ("query", "key", "value")
    choosing = ("query", "key")

    def __init__(self, width: int, tasks: Mapping[str, Bottleneck], *, reads_hidden: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width) * 0.02)
        self.key = nn.Parameter(torch.randn(width, width) * 0.02)
        self.value = nn.Parameter(torch.full((width, width), 1e-6).fill_diagonal_(1.0))
        self.tasks = nn.ModuleDict(tasks)
        self.choices = len(tasks)
        self.reads_hidden = reads_hidden
        self.frozen = tuple(f"tasks.{name}" for name, _ in self.tasks.named_parameters())

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        read = hidden if self.reads_hidden else inputs
        nothing = read.new_zeros(())
        added = torch.stack([adapter(nothing, read) for adapter in self.tasks.values()], -2)
        added = added.to(self.value.dtype)  # [batch, positions, tasks, width]
        asked = read.to(self.query.dtype) @ self.query.T
        shares = torch.softmax(
            (added @ self.key.T) @ asked[..., None], dim=-2
        )  # [batch, positions, tasks, 1]
        return (hidden + ((shares * added).sum(-2) @ self.value.T)).to(hidden.dtype)


# The fields that a fusion and its adapters share.
_SHARED = ("bottleneck", "activation", "dropout", "scale", "layers")


def _check_tasks(name: str, value: Any) -> tuple[str, ...]:
    """Names that may stand in parameter names: different, without a dot, and no attribute of `nn.ModuleDict`."""
    tasks = tuple(value) if hasattr(value, "__iter__") and not isinstance(value, str) else ()
    usable = [
        isinstance(task, str) and task and "." not in task and not hasattr(nn.ModuleDict, task)
        for task in tasks
    ]
    if not tasks or len(set(tasks)) < len(tasks) or not all(usable):
        raise ArgumentError(f"{name}={value!r} is not allowed; give different names such as ('sst2', 'rte')")
    return tasks


@register
@dataclass(frozen=True)
class AdapterFusion(Adapter):
    """Σ_t softmax_t(Q x · K z_t) V z_t over the adapters of several tasks, added in their place (Pfeiffer et al. 2021).

    x is the input of the adapters, z_t what the (frozen) adapter of task t adds to the residual. There are no biases,
    as in the paper's equations. Q, K ~ N(0, 0.02²); V is the identity with 1e-6 outside the diagonal.

    There are two phases: train a `Pfeiffer` per task and `save` each; then `fuse(model, {"rte": folder, …})` attaches
    this adapter and loads them, and training on the target task moves only Q, K, V and the head. `load_adapters` loads
    them into a fusion that is attached already; until then it adds nothing. The file of a fusion holds the adapters
    too. In a `RunSpec`, `tasks` are names of tasks, and `run` does both phases.

    Parameters
    ----------
    tasks: names of the adapters, without dots, since they stand in parameter names.
    bottleneck, activation, dropout, scale, layers: of the adapter of each task; see `Pfeiffer`.

    On BERT-base 3 × 768² = 1,769,472 trained parameters per layer, 21,233,664 in all; 894,528 more are stored for each
    task with a bottleneck of 48. It does not merge.
    """

    tasks: tuple[str, ...] = checked(_check_tasks)
    bottleneck: int = whole(48)
    activation: str = one_of("relu", ACTIVATIONS)
    dropout: float = number(0.0, least=0, below=1)
    scale: float = number(1.0, above=0)
    layers: Layers = all_layers()

    @property
    def single(self) -> Pfeiffer:
        """The adapter of each task."""
        return Pfeiffer(**{name: getattr(self, name) for name in _SHARED})

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for place in self.single.declare(sites):
            assert isinstance(place, Insertion)
            width = place.site.width
            reads_hidden = not cast(Bottleneck, place.module).parallel
            yield replace(place, module=Fusion(width, self._adapters(width), reads_hidden=reads_hidden))

    def _adapters(self, width: int) -> dict[str, Bottleneck]:
        """A fresh adapter for each task, which reads its `inputs` and adds nothing yet."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("activation", "scale", "dropout")}
        return {task: Bottleneck(width, self.bottleneck, parallel=True, **fields) for task in self.tasks}


def fuse(
    model: PreTrainedModel, folders: Mapping[str, str | Path], *, seed: int = 0, strict: bool = True
) -> attachments.Attachment:
    """Attach an `AdapterFusion` over the `Pfeiffer` adapters saved in `folders` (task name -> folder) to `model`.

    They must have the same fields and, with `strict`, be trained on this backbone. Their heads are not used.
    """
    if not folders:
        raise ArgumentError("folders={} is not allowed; give the folder of a saved Pfeiffer adapter at least")
    first, _ = _read(next(iter(folders.values())))
    fields = {name: getattr(first, name) for name in _SHARED}
    attachment = attachments.attach(model, AdapterFusion(tuple(folders), **fields), seed=seed)
    try:
        load_adapters(attachment, folders, strict=strict)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def load_adapters(
    attachment: attachments.Attachment, folders: Mapping[str, str | Path], *, strict: bool = True
) -> None:
    """Load saved single-task adapters (task name -> folder) into an attached `AdapterFusion`; see `fuse`."""
    fusion = attachment.adapter
    if not isinstance(fusion, AdapterFusion):
        raise ArgumentError(f"attachment of {fusion} holds no AdapterFusion to load adapters into")
    state: dict[str, Tensor] = {}
    needed = attachment.named_parameters("adapter")
    for task, folder in folders.items():
        if task not in fusion.tasks:
            raise ArgumentError(
                f"task {task!r} is not allowed; this fusion is over {', '.join(map(repr, fusion.tasks))}"
            )
        single, backbone = _read(folder)
        if single != fusion.single:
            raise ArgumentError(f"folder={str(folder)!r} holds {single}; this fusion is over {fusion.single}")
        if strict:
            check_backbone(folder, backbone, attachment.model.config, attachment.untrained_base())
        for name, value in read_state(folder).items():
            role, kind, *where = name.split(".", 4)
            if (role, kind) == ("adapter", "layers"):
                layer, site, *parts = where
                state[".".join((role, kind, layer, site, "tasks", task, *parts))] = value
        if lacking := [name for name in needed if f".tasks.{task}." in name and name not in state]:
            raise DataError(
                f"the file in folder={str(folder)!r} lacks {len(lacking)} tensors of {single}, the one for "
                f"{lacking[0]!r} first"
            )
    attachment.load_state_dict(state)


def _read(folder: str | Path) -> tuple[Pfeiffer, dict[str, Any]]:
    """The adapter saved in `folder`, without its way of initialisation, and the record of its backbone."""
    config = read_config(folder)
    single = adapter_from_dict(config["adapter"])
    if not isinstance(single, Pfeiffer) or single.gated:
        raise ArgumentError(
            f"folder={str(folder)!r} holds {single}; fusion is over Pfeiffer adapters without gates"
        )
    return replace(single, init="zero"), config["backbone"]
