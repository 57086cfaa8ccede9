"""One stage of training: some parameters, some epochs, and the best of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Protocol_

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


class OnStep(Protocol_):
    """What is called after every optimizer step of the stage that trains the adapter.

    `step` counts from 1 to `steps`. While it returns True, the model is still changing its form (masks narrow): an
    epoch that ends so is not selected, and patience does not run.
    """

    def __call__(self, step: int, steps: int, optimizer: Optimizer) -> bool: ...


@dataclass
class Run:
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


def train_stage(run: Run, stage: Stage, training: Source, validation: Source | None) -> None:
    """Train the parameters of `stage.roles` and leave them at the selected epoch.

    The whole model is in training mode, so dropout is on in the frozen backbone too, as in full fine-tuning.
    Raises `TrainingError` when the loss is not finite.
    """
    protocol, accelerator, model = run.protocol, run.accelerator, run.attachment.model
    run.attachment.train_only(*stage.roles)
    # Some parts of an adapter never train (the adapters under a fusion), whatever their role.
    parameters = [p for role in stage.roles for p in run.attachment.parameters(role) if p.requires_grad]
    # Whatever was drawn before (features found or computed, earlier stages), a stage starts from the same state.
    seed = mix(run.seed, stage.number)
    set_seed(seed, device_specific=True)
    plain = training.training(protocol.batch_size, seed=seed)
    loader = accelerator.prepare_data_loader(plain)
    optimizer = make_optimizer(parameters, stage.learning_rate, protocol)
    steps = stage.epochs * len(loader)
    scheduler = make_scheduler(optimizer, steps, protocol)
    keeper = Keeper(parameters, protocol)
    show = accelerator.is_main_process
    hook = run.on_step if stage.name == "stage_two" else None
    title = stage.name.replace("_", " ")
    if show:
        tell(f"{title}: at most {stage.epochs} epochs of {len(loader)} steps")
    with (
        _distributed(accelerator, model) as wrapped,
        bar(total=steps, description=title, unit="step", show=show) as progress,
    ):
        watch = _LossWatch(run, stage, progress)
        after = _AfterStep(hook, steps, optimizer)
        for epoch in range(1, stage.epochs + 1):
            # Twice: the prepared loader counts for itself on one process, and does not reach the sampler on several.
            loader.set_epoch(epoch)
            plain.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            row = _epoch(run, stage, epoch, loader, wrapped, parameters, optimizer, scheduler, watch, after)
            if validation is not None:
                with run.timed("evaluation"):
                    predicted = run.kind.predict(accelerator, model, validation, protocol.eval_batch_size)
                    found = run.kind.score(run.metrics, predicted, validation.rows)
                row |= {f"eval_{name}": value for name, value in found.items()}
                if not after.unsettled:
                    keeper.offer(epoch, found[run.metrics[0]], found["loss"])
            run.history.append(row)
            if show:
                tell(f"{title}, epoch {epoch} of {stage.epochs}: {_said(row)}")
            if not after.unsettled and keeper.exhausted(epoch):
                break
    run.selected[stage.name] = keeper.restore(epoch)
    model.eval()


def _said(row: dict[str, Any]) -> str:
    """The losses, scores and seconds of an epoch in words."""
    scores = {name: value for name, value in row.items() if name == "loss" or name.startswith("eval_")}
    return ", ".join([*(f"{name} {value:.4f}" for name, value in scores.items()), f"{row['seconds']:.1f} s"])


def _epoch(
    run: Run,
    stage: Stage,
    epoch: int,
    loader: Any,
    wrapped: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: AdamW,
    scheduler: LRScheduler,
    watch: _LossWatch,
    after: _AfterStep,
) -> dict[str, Any]:
    """One pass over the training rows; the start of a row of the history."""
    accelerator, clip = run.accelerator, run.protocol.clip
    before = run.times[stage.name]
    with run.timed(stage.name):
        wrapped.train()
        for batch in loader:
            with accelerator.autocast():
                loss = wrapped(**inputs_of(batch), **run.kind.targets(batch)).loss
            accelerator.backward(loss)
            if clip is not None:
                accelerator.clip_grad_norm_(parameters, clip)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            after.step(watch.step + 1)
            scheduler.step()
            optimizer.zero_grad()
            watch.add(epoch, loss.detach(), rate)
        mean = watch.end_of_epoch()
    return {
        "stage": stage.number,
        "epoch": epoch,
        "step": watch.step,
        "loss": mean,
        "learning_rate": rate,
        "seconds": run.times[stage.name] - before,
    }


@dataclass
class _AfterStep:
    """The run's `on_step`, if it has one, and what it said last."""

    hook: OnStep | None
    steps: int
    optimizer: AdamW
    unsettled: bool = False

    def step(self, step: int) -> None:
        if self.hook is not None:
            self.unsettled = self.hook(step, self.steps, self.optimizer)


class _LossWatch:
    """Collects losses and looks at them now and then: a look per step would make a GPU wait for the CPU."""

    def __init__(self, run: Run, stage: Stage, progress: Any) -> None:
        self.run, self.stage, self.progress = run, stage, progress
        self.step = 0
        self.pending: list[tuple[int, int, Tensor, float]] = []
        self.seen: list[float] = []

    def add(self, epoch: int, loss: Tensor, rate: float) -> None:
        self.step += 1
        self.pending.append((epoch, self.step, loss, rate))
        if len(self.pending) >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        if not self.pending:
            return
        # The mean over processes, so that all of them stop at the same step.
        losses = self.run.accelerator.reduce(
            torch.stack([entry[2].float() for entry in self.pending]), "mean"
        ).tolist()
        for (epoch, step, _, rate), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                raise divergence(self.stage, self.run.protocol, loss, epoch, step, rate)
        self.seen += losses
        self.progress.update(len(losses))
        self.progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        self.pending = []

    def end_of_epoch(self) -> float:
        """The mean loss since the last call."""
        self.look()
        mean, self.seen = sum(self.seen) / len(self.seen), []
        return mean


def divergence(
    stage: Stage, protocol: Protocol, loss: float, epoch: int, step: int, rate: float
) -> TrainingError:
    """What to say of a loss that is not finite."""
    field = "head_learning_rate" if stage.roles == ("head",) else "learning_rate"
    return TrainingError(
        f"the loss became {loss} in stage {stage.number} ({', '.join(stage.roles)}), epoch {epoch}, step {step}, at "
        f"learning rate {rate:.3g}; the weights are back where they were. Lower {field}={stage.learning_rate:g}, or "
        f"raise warmup={protocol.warmup:g}"
    )


class Keeper:
    """Remembers the best weights, and when to give up."""

    def __init__(self, parameters: Sequence[Tensor], protocol: Protocol) -> None:
        self.parameters, self.protocol = parameters, protocol
        self.best: tuple[float, float] | None = None
        self.epoch = 0
        self.kept: list[Tensor] = []

    def offer(self, epoch: int, metric: float, loss: float) -> None:
        standing = (metric, -loss)
        if self.best is None or standing > self.best:
            self.best, self.epoch = standing, epoch
            if self.protocol.select == "best":
                self.kept = snapshot(self.parameters)

    def exhausted(self, epoch: int) -> bool:
        return self.protocol.patience is not None and epoch - self.epoch >= self.protocol.patience

    def restore(self, last: int) -> int:
        """Put the selected weights back; the epoch they come from."""
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
    """AdamW that decays matrices only: vectors, norms and biases have their own natural values to stay near."""
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
    """Warm-up over `protocol.warmup` of the steps, then a linear fall to zero or a constant rate."""
    name = "linear" if protocol.schedule == "linear" else "constant_with_warmup"
    return get_scheduler(name, optimizer, math.ceil(protocol.warmup * steps), steps)


@contextmanager
def _distributed(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[nn.Module]:
    """`model` wrapped for several processes, or itself on one; it leaves no trace on `model`."""
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
