"""What the stages of a bank share: the runs, their stacked parameters, and one forward pass for all of them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.bank_attention import folded_attention
from hadamard_toolkit.training.bank_rows import PartRows, stacked
from hadamard_toolkit.training.data import Data
from hadamard_toolkit.training.stages import TrainingState

EVALUATED = 2048  # rows per batch of an evaluation on a GPU, over all runs

Stacked = dict[str, Tensor]  # parameters by name, each [runs, …]


class Forward:
    """A model as a function of some of its parameters and a batch, for several runs at once."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._slots = [
            (module._parameters, key, names[id(parameter)])
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        # The row of each embedding that has no gradient. The batching rule of torch knows it for the first run only.
        self.padding = {
            names[id(module.weight)]: module.padding_idx
            for module in model.modules()
            if isinstance(module, nn.Embedding) and id(module.weight) in names
        }
        self._cast = _Cast(model, names)

    def __call__(self, values: Stacked, inputs: Batch) -> Tensor:
        """Logits [runs, rows, outputs] from `inputs` [runs, rows, …]; every run draws its own dropout."""
        with folded_attention():
            logits: Tensor = torch.func.vmap(self.alone, randomness="different")(values, inputs)
        return logits

    def alone(self, values: dict[str, Tensor], inputs: Batch) -> Tensor:
        """The same for one run: logits [rows, outputs]."""
        slots = [(home, key, values[name]) for home, key, name in self._slots if name in values]
        slots += self._cast.slots()
        before = [home[key] for home, key, _ in slots]
        try:
            for home, key, value in slots:
                home[key] = value  # type: ignore[assignment]
            logits: Tensor = self.model(**inputs).logits
            return logits
        finally:
            for (home, key, _), parameter in zip(slots, before, strict=True):
                home[key] = parameter


class _Cast:
    """The frozen weights of linear layers in the type of autocast, which would cast them again in every step."""

    def __init__(self, model: nn.Module, trained: Container[int]) -> None:
        self._linear = [
            (module._parameters, key, parameter)
            for module in model.modules()
            if type(module) is nn.Linear
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in trained
        ]
        self._slots: list[tuple[dict[str, nn.Parameter | None], str, Tensor]] = []

    def slots(self) -> list[tuple[dict[str, nn.Parameter | None], str, Tensor]]:
        """(parameters of a module, name, cast value) of each; none outside of autocast."""
        if not self._linear or not torch.is_autocast_enabled(device := self._linear[0][2].device.type):
            return []
        if not self._slots:
            kind = torch.get_autocast_dtype(device)
            self._slots = [(home, key, parameter.detach().to(kind)) for home, key, parameter in self._linear]
        return self._slots


@dataclass
class BankState:
    """The runs of a bank and how far they are.

    `values` are the parameters of all runs; once a stage is over, those of each run's selected epoch. `removed` marks
    the entries that masks keep at zero, for parameters with masks. `failed` holds the error of each run that ended
    early, by its index.
    """

    runs: list[TrainingState]
    data: list[Data]
    accelerator: Accelerator
    forward: Forward
    values: Stacked
    removed: Stacked
    failed: dict[int, Exception] = field(default_factory=dict)

    @property
    def template(self) -> Attachment:
        """The attachment whose model computes for all."""
        return self.runs[0].attachment

    @property
    def alive(self) -> list[int]:
        """The indices of the runs that have not failed."""
        return [index for index in range(len(self.runs)) if index not in self.failed]

    def predict(self, values: Stacked, part: PartRows, runs: Sequence[int]) -> list[np.ndarray]:
        """Logits [rows, outputs] of `runs` on their rows of `part`, in evaluation mode; `values` are theirs."""
        positions = [part.positions[index] for index in runs]
        orders = [np.argsort(-part.table.lengths[rows], kind="stable") for rows in positions]
        most, longest = self.runs[0].protocol.eval_batch_size, max(map(len, positions))
        if self.accelerator.device.type != "cpu":
            most = max(most, EVALUATED)
        size = max(1, min(most // len(runs), longest))
        batches = math.ceil(longest / size)
        by_length = [rows[order] for rows, order in zip(positions, orders, strict=True)]
        self.template.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            logits = [
                self.forward(values, part.table.take(batch)[0]).float()
                for batch in np.split(stacked(by_length, batches * size), batches, axis=1)
            ]
        results = torch.cat(logits, 1).cpu().numpy()
        return [
            result[np.argsort(order, kind="stable")] for result, order in zip(results, orders, strict=True)
        ]


def select(values: Stacked, runs: Sequence[int], names: Iterable[str]) -> Stacked:
    """The parameters `names` of some runs, as far as `values` has them."""
    return {name: values[name][list(runs)] for name in names if name in values}
