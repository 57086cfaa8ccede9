"""What the runs of a bank hold: their stacked parameters, the optimizer over them, and their rows on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hadamard_toolkit.training.bank_attention import folded_attention
from hadamard_toolkit.training.batching import Batch, Examples, Source
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.stages import make_scheduler

ALIGNED = 64  # numbers; tensors whose size is a multiple of it come first, so that kernels find them aligned
CLIPPING_EPSILON = 1e-6  # that of torch.nn.utils.clip_grad_norm_

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

    def __call__(self, values: Stacked, inputs: Batch) -> Tensor:
        """Logits [runs, rows, outputs] from `inputs` [runs, rows, …]; every run draws its own dropout."""
        with folded_attention():
            logits: Tensor = torch.func.vmap(self.alone, randomness="different")(values, inputs)
        return logits

    def alone(self, values: dict[str, Tensor], inputs: Batch) -> Tensor:
        """The same for one run: logits [rows, outputs]."""
        before = [(home, key, home[key]) for home, key, name in self._slots if name in values]
        try:
            for home, key, name in self._slots:
                if name in values:
                    home[key] = values[name]  # type: ignore[assignment]
            logits: Tensor = self.model(**inputs).logits
            return logits
        finally:
            for home, key, parameter in before:
                home[key] = parameter


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
    """Trained parameters of several runs as one matrix [runs, numbers], and AdamW on it with a rate per run.

    The update is that of `torch.optim.AdamW`, clipping that of `torch.nn.utils.clip_grad_norm_` for each run by itself.
    `leaves` are the parameters by name, views of the matrix that take gradients. Matrices decay, vectors do not.
    `removed` [runs, …] by name are entries that stay zero.
    """

    def __init__(self, values: Stacked, courses: Sequence[Course], removed: Stacked) -> None:
        runs, some = len(courses), next(iter(values.values()))
        device = some.device
        self._shapes = {
            name: value.shape[1:]
            for name, value in sorted(values.items(), key=lambda item: bool(item[1][0].numel() % ALIGNED))
        }
        width = -(-sum(shape.numel() for shape in self._shapes.values()) // ALIGNED) * ALIGNED
        self.matrix = torch.zeros(runs, width, dtype=some.dtype, device=device)
        for name, view in self._views(self.matrix).items():
            view.copy_(values[name])
        self.removed: Tensor | None = None
        if removed:
            self.removed = torch.zeros(runs, width, dtype=torch.bool, device=device)
            for name, view in self._views(self.removed).items():
                if name in removed:
                    view.copy_(removed[name])
        self.first, self.second = torch.zeros_like(self.matrix), torch.zeros_like(self.matrix)
        self._decaying = torch.zeros_like(self.matrix[0])
        for name, view in self._views(self._decaying[None]).items():
            view.fill_(float(len(self._shapes[name]) >= 2))
        self._unused: set[str] = set()
        self._tables(courses, device)
        self._renew()

    def _views(self, matrix: Tensor) -> Stacked:
        start, found = 0, {}
        for name, shape in self._shapes.items():
            found[name] = matrix[:, start : start + shape.numel()].view(len(matrix), *shape)
            start += shape.numel()
        self._used = start
        return found

    def _tables(self, courses: Sequence[Course], device: torch.device) -> None:
        """Per step and run, on the device before training starts: a look at the host per step would cost."""
        self.rates = np.zeros((max(course.steps for course in courses), len(courses)))
        known: dict[Any, np.ndarray] = {}
        for run, course in enumerate(courses):
            if course not in known:
                known[course] = course.rates()
            self.rates[: course.steps, run] = known[course]
        first, second = np.array([course.protocol.betas for course in courses]).T
        step = np.arange(1, len(self.rates) + 1)[:, None]
        decay = np.array([course.protocol.weight_decay for course in courses])
        clip = [course.protocol.clip for course in courses]

        def there(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=self.matrix.dtype, device=device)

        self._by_step = {
            "size": there(self.rates / (1 - first**step))[..., None],
            "root": there(1 / np.sqrt(1 - second**step))[..., None],
            "decay": there(self.rates * decay)[..., None],
        }
        self._by_run = {
            "first": there(1 - first)[:, None],
            "second": there(1 - second)[:, None],
            "epsilon": there([course.protocol.epsilon for course in courses])[:, None],
            "clip": there([np.inf if limit is None else limit for limit in clip])[:, None],
        }
        self._clips, self._decays = any(limit is not None for limit in clip), bool(decay.any())

    def _renew(self) -> None:
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
        pieces = []
        for (name, leaf), gradient in zip(self.leaves.items(), gradients, strict=True):
            if gradient is None:  # not in the graph at all: torch's optimizers leave it alone, decay included
                if name not in self._unused:
                    self._unused.add(name)
                    self._views(self._decaying[None])[name].zero_()
                gradient = torch.zeros_like(leaf)
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

    def values(self, row: int) -> dict[str, Tensor]:
        """The parameters of one run, as views."""
        return {name: leaf.detach()[row] for name, leaf in self.leaves.items()}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these runs alone."""
        chosen = torch.as_tensor(list(rows), device=self.matrix.device)
        self.matrix, self.first, self.second = (t[chosen] for t in (self.matrix, self.first, self.second))
        if self.removed is not None:
            self.removed = self.removed[chosen]
        self.rates = self.rates[:, list(rows)]
        self._by_step = {name: table[:, chosen] for name, table in self._by_step.items()}
        self._by_run = {name: table[chosen] for name, table in self._by_run.items()}
        self._renew()


class Table:
    """Rows of several sources, one below the other, as padded tensors on the device."""

    def __init__(self, sources: Sequence[Source], device: torch.device) -> None:
        self.device = device
        self._multiple = (
            8 if device.type == "cuda" else 1
        )  # lengths that suit tensor cores and fused attention
        batch = _joined_rows(sources)
        batch.pop("row")
        self.labels = batch.pop("labels").to(device)
        self.inputs = {name: value.to(device) for name, value in inputs_of(batch).items()}
        self.lengths = np.concatenate([np.asarray(source.rows.lengths) for source in sources])

    def take(self, places: np.ndarray) -> tuple[Batch, Tensor]:
        """Inputs [runs, rows, longest of them, …] and labels [runs, rows] of rows by their places [runs, rows]."""
        longest = -(-int(self.lengths[places].max()) // self._multiple) * self._multiple
        here = torch.from_numpy(places).to(self.device, non_blocking=True)
        return {name: value[:, :longest][here] for name, value in self.inputs.items()}, self.labels[here]


def _joined_rows(sources: Sequence[Source]) -> Batch:
    if all(isinstance(source.rows, Examples) for source in sources):
        rows = [row for source in sources for row in source.rows.__getitems__(range(len(source.rows)))]
        return sources[0].collate(rows)
    batches = [source.collate(source.rows.__getitems__(range(len(source.rows)))) for source in sources]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
