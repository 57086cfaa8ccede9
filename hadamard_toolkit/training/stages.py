"""One stage of training: some parameters, some epochs, and the best of them."""

from __future__ import annotations

import math
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import TrainingError
from hadamard_toolkit.training.batching import Source, mix
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.progress import bar, tell
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.task_types import Kind

LOOK_EVERY = 16  # steps between looks at the loss; each look waits for the device


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from another."""

    number: int
    name: str  # a key of the times: "stage_one" | "stage_two"
    roles: tuple[str, ...]
    learning_rate: float
    epochs: int


class OnStep(typing.Protocol):
    """What is called after every optimizer step of the stage that trains the adapter; `step` counts from 1 to `steps`.

    It returns True while the model is still changing its form (masks narrow): an epoch that ends so is not selected,
    and does not count against patience.
    """

    def __call__(self, step: int, steps: int, optimizer: Optimizer) -> bool: ...


@dataclass
class TrainingState:
    """What all stages of a run share, and what they leave behind."""

    attachment: Attachment
    accelerator: Accelerator
    protocol: Protocol
    kind: Kind
    metrics: tuple[str, ...]  # the first one selects
    seed: int
    on_step: OnStep | None = None  # in stage two
    history: list[dict[str, Any]] = field(default_factory=list)
    selected: dict[str, int] = field(default_factory=dict)  # stage name -> epoch
    times: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("features", "stage_one", "stage_two", "evaluation"), 0.0)
    )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `times[name]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] += time.perf_counter() - started


def train_stage(state: TrainingState, stage: Stage, training: Source, validation: Source | None) -> None:
    """Train the parameters of `stage.roles` and leave them at the selected epoch.

    The whole model is in training mode, so dropout is on in the frozen backbone too, as in full fine-tuning.
    Raises `TrainingError` when the loss is not finite.
    """
    protocol, accelerator, model = state.protocol, state.accelerator, state.attachment.model
    state.attachment.train_only(*stage.roles)
    # Some parts of an adapter never train (the adapters under a fusion), whatever their role.
    parameters = [p for role in stage.roles for p in state.attachment.parameters(role) if p.requires_grad]
    # Whatever was drawn before (features found or computed, earlier stages), a stage starts from the same state.
    seed = mix(state.seed, stage.number)
    set_seed(seed, device_specific=True)
    plain = training.training(protocol.batch_size, seed=seed)
    loader = accelerator.prepare_data_loader(plain)
    keeper = Keeper(parameters, protocol)
    show, title = accelerator.is_main_process, stage.name.replace("_", " ")
    if show:
        tell(f"{title}: at most {stage.epochs} epochs of {len(loader)} steps")
    steps = stage.epochs * len(loader)
    with (
        _distributed(accelerator, model) as wrapped,
        bar(total=steps, description=title, unit="step", show=show) as progress,
    ):
        loop = _Loop(state, stage, wrapped, parameters, steps, progress)
        for epoch in range(1, stage.epochs + 1):
            # Twice: the prepared loader counts for itself on one process, and does not reach the sampler on several.
            loader.set_epoch(epoch)
            plain.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            row, scores = loop.epoch(epoch, loader), {}
            if validation is not None:
                with state.timed("evaluation"):
                    predictions = state.kind.predict(accelerator, model, validation, protocol.eval_batch_size)
                    scores = state.kind.score(state.metrics, predictions, validation.rows)
                if not loop.unsettled:
                    keeper.offer(epoch, scores[state.metrics[0]], scores["loss"])
            row |= {f"eval_{name}": value for name, value in scores.items()}
            state.history.append(row)
            if show:
                tell(f"{title}, epoch {epoch} of {stage.epochs}: {_in_words(row)}")
            if not loop.unsettled and keeper.exhausted(epoch):
                break
    state.selected[stage.name] = keeper.restore(epoch)
    model.eval()


def _in_words(row: dict[str, Any]) -> str:
    """The losses, scores and seconds of an epoch."""
    scores = [
        f"{name} {value:.4f}" for name, value in row.items() if name == "loss" or name.startswith("eval_")
    ]
    return ", ".join([*scores, f"{row['seconds']:.1f} s"])


class _Loop:
    """The optimizer steps of one stage.

    Losses are looked at every `LOOK_EVERY` steps: a look at each would make a GPU wait for the CPU.
    """

    def __init__(
        self,
        state: TrainingState,
        stage: Stage,
        model: nn.Module,
        parameters: list[nn.Parameter],
        steps: int,
        progress: Any,
    ) -> None:
        self.state, self.stage, self.model, self.parameters = state, stage, model, parameters
        self.steps, self.progress = steps, progress
        self.optimizer = make_optimizer(parameters, stage.learning_rate, state.protocol)
        self.scheduler = make_scheduler(self.optimizer, steps, state.protocol)
        self.hook = state.on_step if stage.name == "stage_two" else None
        self.unsettled = False  # what the hook returned last
        self.step = 0
        self._pending: list[tuple[int, Tensor, float]] = []  # step, loss, learning rate
        self._losses: list[float] = []

    def epoch(self, epoch: int, loader: Any) -> dict[str, Any]:
        """One pass over the training rows; its row of the history."""
        state, stage, clip = self.state, self.stage, self.state.protocol.clip
        seconds, self._losses = state.times[stage.name], []
        with state.timed(stage.name):
            self.model.train()
            for batch in loader:
                with state.accelerator.autocast():
                    loss = self.model(**inputs_of(batch), **state.kind.targets(batch)).loss
                state.accelerator.backward(loss)
                if clip is not None:
                    state.accelerator.clip_grad_norm_(self.parameters, clip)
                rate = self.optimizer.param_groups[0]["lr"]
                self.optimizer.step()
                self.step += 1
                if self.hook is not None:
                    self.unsettled = self.hook(self.step, self.steps, self.optimizer)
                self.scheduler.step()
                self.optimizer.zero_grad()
                self._pending.append((self.step, loss.detach(), rate))
                if len(self._pending) == LOOK_EVERY:
                    self._look(epoch)
            self._look(epoch)
        seconds = state.times[stage.name] - seconds
        return history_row(stage, epoch, self.step, self._losses, rate, seconds)

    def _look(self, epoch: int) -> None:
        if not self._pending:
            return
        # The mean over processes, so that all of them stop at the same step.
        stacked = torch.stack([loss.float() for _, loss, _ in self._pending])
        losses = self.state.accelerator.reduce(stacked, "mean").tolist()
        for (step, _, rate), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                raise divergence(self.stage, self.state.protocol, loss, epoch, step, rate)
        self._losses += losses
        self._pending = []
        self.progress.update(len(losses))
        self.progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)


def history_row(
    stage: Stage, epoch: int, step: int, losses: list[float], rate: float, seconds: float
) -> dict[str, Any]:
    """One epoch in the history, before its evaluation."""
    return {
        "stage": stage.number,
        "epoch": epoch,
        "step": step,
        "loss": sum(losses) / len(losses),
        "learning_rate": rate,
        "seconds": seconds,
    }


def divergence(
    stage: Stage, protocol: Protocol, loss: float, epoch: int, step: int, rate: float
) -> TrainingError:
    """The error for a loss that is not finite."""
    field = "head_learning_rate" if stage.roles == ("head",) else "learning_rate"
    return TrainingError(
        f"the loss became {loss} in stage {stage.number} ({', '.join(stage.roles)}), epoch {epoch}, step {step}, at "
        f"learning rate {rate:.3g}; the weights are back where they were. Lower {field}={stage.learning_rate:g}, or "
        f"raise warmup={protocol.warmup:g}"
    )


class Keeper:
    """Remembers the best epoch and its weights, and says when patience has run out."""

    def __init__(self, parameters: Sequence[Tensor], protocol: Protocol) -> None:
        self.parameters, self.protocol = parameters, protocol
        self.best: tuple[float, float] | None = None
        self.epoch = 0
        self.kept: list[Tensor] = []

    def offer(self, epoch: int, metric: float, loss: float) -> None:
        rank = (metric, -loss)
        if self.best is None or rank > self.best:
            self.best, self.epoch = rank, epoch
            if self.protocol.select == "best":
                self.kept = snapshot(self.parameters)

    def exhausted(self, epoch: int) -> bool:
        return self.protocol.patience is not None and epoch - self.epoch >= self.protocol.patience

    def restore(self, last: int) -> int:
        """Put the selected weights back, if any were kept; returns the epoch that the weights are of."""
        if not self.kept:
            return last
        put_back(self.parameters, self.kept)
        return self.epoch


def snapshot(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `parameters` in main memory."""
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def put_back(parameters: Sequence[Tensor], values: list[Tensor]) -> None:
    """Set `parameters` to what `snapshot` returned."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def make_optimizer(parameters: list[nn.Parameter], learning_rate: float, protocol: Protocol) -> AdamW:
    """AdamW that decays matrices only, never vectors, norms or biases, whose natural values need not be near zero."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": protocol.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=protocol.betas,
        eps=protocol.epsilon,
        fused=True,  # one kernel for many small vectors
    )


def make_scheduler(optimizer: AdamW, steps: int, protocol: Protocol) -> LRScheduler:
    """Warm-up over the share `protocol.warmup` of the steps, then a linear fall to zero or a constant rate."""
    name = "linear" if protocol.schedule == "linear" else "constant_with_warmup"
    return get_scheduler(name, optimizer, math.ceil(protocol.warmup * steps), steps)


@contextmanager
def _distributed(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[nn.Module]:
    """`model` wrapped for several processes, or itself on one; leaves no trace on `model`."""
    if accelerator.num_processes == 1:
        yield model
        return
    held = dict(model.__dict__)
    try:
        yield accelerator.prepare_model(model)
    finally:
        for name in ("forward", "_original_forward"):  # accelerate's own patch for autocast
            if name not in held:
                model.__dict__.pop(name, None)
