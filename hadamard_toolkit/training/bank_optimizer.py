"""AdamW for the runs of a bank: one update for all, with each run's own rate, clipping and decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from hadamard_toolkit.training.bank_state import Stacked
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.stages import make_scheduler

ALIGNED = 64  # numbers; tensors whose size is a multiple of it come first, so that kernels find them aligned
CLIPPING_EPSILON = 1e-6  # that of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Course:
    """What the optimizer needs to know of one run."""

    protocol: Protocol
    learning_rate: float
    steps: int

    def rates(self) -> np.ndarray:
        """The learning rate of every step [steps]."""
        scheduler: Any = make_scheduler(AdamW([torch.zeros(1)], lr=1.0), self.steps, self.protocol)
        factor = scheduler.lr_lambdas[0]
        return self.learning_rate * np.array([factor(step) for step in range(self.steps)])


class StackedAdamW:
    """The trained parameters of several runs as one matrix [runs, numbers], and AdamW on it.

    The update is that of `torch.optim.AdamW`, clipping that of `torch.nn.utils.clip_grad_norm_` for each run by itself.
    Matrices decay, vectors do not. `leaves` are the parameters by name: views of the matrix that take gradients.
    Entries that `removed` marks stay zero, and the row of a matrix that `padding` names has no gradient.
    """

    def __init__(
        self,
        values: Stacked,
        courses: Sequence[Course],
        removed: Stacked,
        padding: Mapping[str, int | None] = MappingProxyType({}),
    ) -> None:
        self._padding = padding
        sizes = {name: value[0].numel() for name, value in values.items()}
        self._shapes = {
            name: values[name].shape[1:]
            for name in sorted(values, key=lambda name: sizes[name] % ALIGNED > 0)
        }
        self._used = sum(sizes.values())
        width = -(-self._used // ALIGNED) * ALIGNED
        self.matrix = next(iter(values.values())).new_zeros(len(courses), width)
        for name, view in self._views(self.matrix).items():
            view.copy_(values[name])
        self.removed: Tensor | None = None
        if removed:
            self.removed = torch.zeros_like(self.matrix, dtype=torch.bool)
            for name, view in self._views(self.removed).items():
                if name in removed:
                    view.copy_(removed[name])
        self.first, self.second = torch.zeros_like(self.matrix), torch.zeros_like(self.matrix)
        self._decaying = torch.zeros_like(self.matrix[:1])
        for name, view in self._views(self._decaying).items():
            view.fill_(float(len(self._shapes[name]) >= 2))
        self._unused: set[str] = set()
        self._make_tables(courses)
        self._make_leaves()

    def _views(self, matrix: Tensor) -> Stacked:
        pieces = matrix[:, : self._used].split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: piece.view(len(matrix), *shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def _make_tables(self, courses: Sequence[Course]) -> None:
        """Put every number of every step on the device before training starts: looking them up later would cost."""
        self.rates = np.zeros((max(course.steps for course in courses), len(courses)))  # [steps, runs]
        known = {course: course.rates() for course in set(courses)}
        for run, course in enumerate(courses):
            self.rates[: course.steps, run] = known[course]
        protocols = [course.protocol for course in courses]
        first, second = np.array([protocol.betas for protocol in protocols]).T
        step = np.arange(1, len(self.rates) + 1)[:, None]
        decay = np.array([protocol.weight_decay for protocol in protocols])
        clip = np.array([np.inf if protocol.clip is None else protocol.clip for protocol in protocols])
        self._clips, self._decays = bool(np.isfinite(clip).any()), bool(decay.any())
        by_step = {
            "size": self.rates / (1 - first**step),
            "root": 1 / np.sqrt(1 - second**step),
            "decay": self.rates * decay,
        }
        epsilon = np.array([protocol.epsilon for protocol in protocols])
        by_run = {"first": 1 - first, "second": 1 - second, "epsilon": epsilon, "clip": clip}
        # With a last axis of one, to be spread over the numbers of a run.
        self._by_step = {
            name: torch.from_numpy(table).to(self.matrix)[..., None] for name, table in by_step.items()
        }
        self._by_run = {
            name: torch.from_numpy(table).to(self.matrix)[..., None] for name, table in by_run.items()
        }

    def _make_leaves(self) -> None:
        self.leaves = {
            name: view.detach().requires_grad_() for name, view in self._views(self.matrix).items()
        }
        self._rest = self.matrix.new_zeros(len(self.matrix), self.matrix.shape[1] - self._used)

    def step(self, losses: Tensor, step: int) -> None:
        """One update of every run after `step` (from 0) others; `losses` [runs] are those of the leaves."""
        gradients = torch.autograd.grad(losses.sum(), list(self.leaves.values()), allow_unused=True)
        with torch.no_grad():
            self._update(self._joined(gradients), step)

    def _joined(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradients as a matrix [runs, numbers]."""
        pieces = []
        for (name, leaf), gradient in zip(self.leaves.items(), gradients, strict=True):
            if gradient is None:
                # The loss does not depend on it, so it does not decay either, as in torch's optimizers.
                if name not in self._unused:
                    self._unused.add(name)
                    self._views(self._decaying)[name].zero_()
                gradient = torch.zeros_like(leaf)
            if (row := self._padding.get(name)) is not None:
                gradient[:, row] = 0.0
            pieces.append(gradient.flatten(1))
        return torch.cat([*pieces, self._rest], 1)

    def _update(self, gradient: Tensor, step: int) -> None:
        now, run = {name: table[step] for name, table in self._by_step.items()}, self._by_run
        if self.removed is not None:
            gradient.masked_fill_(self.removed, 0.0)
        if self._clips:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((run["clip"] / (norm + CLIPPING_EPSILON)).clamp_(max=1.0))
        if self._decays:
            self.matrix.addcmul_(self.matrix * now["decay"], self._decaying, value=-1)
        self.first.lerp_(gradient, run["first"])
        self.second.lerp_(gradient * gradient, run["second"])
        size = (self.second.sqrt() * now["root"]).add_(run["epsilon"])
        self.matrix.addcdiv_(self.first * now["size"], size, value=-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these runs alone."""
        chosen = torch.as_tensor(list(rows), device=self.matrix.device)
        self.matrix, self.first, self.second = (t[chosen] for t in (self.matrix, self.first, self.second))
        if self.removed is not None:
            self.removed = self.removed[chosen]
        self.rates = self.rates[:, list(rows)]
        self._by_step = {name: table[:, chosen] for name, table in self._by_step.items()}
        self._by_run = {name: table[chosen] for name, table in self._by_run.items()}
        self._make_leaves()
