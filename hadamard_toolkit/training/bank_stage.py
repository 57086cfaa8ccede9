"""One stage of a bank: every run takes a step in every pass, until it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional

from hadamard_toolkit.training.bank_state import Course, Forward, Stacked, StackedAdamW, Table
from hadamard_toolkit.training.batching import LengthBucketedBatches, mix
from hadamard_toolkit.training.loop import Data
from hadamard_toolkit.training.progress import bar
from hadamard_toolkit.training.stages import LOOK_EVERY, Keeper, Run, Stage, divergence

EVALUATED = 2048  # rows per batch of an evaluation on a GPU, over all runs


class Bank:
    """What the stages of a bank share.

    `values` are the parameters of all runs [runs, …] by name, selected weights included once a stage is over; `failed`
    holds the error of each run that ended early, by its place.
    """

    def __init__(
        self,
        runs: list[Run],
        data: list[Data],
        accelerator: Accelerator,
        forward: Forward,
        values: Stacked,
        removed: Stacked,
    ) -> None:
        self.runs, self.data, self.accelerator = runs, data, accelerator
        self.forward, self.values, self.removed = forward, values, removed
        self.template = runs[0].attachment  # its model computes for all
        self.failed: dict[int, Exception] = {}

    @property
    def alive(self) -> list[int]:
        """The places of the runs that have not failed."""
        return [index for index in range(len(self.runs)) if index not in self.failed]

    def of(self, indices: Sequence[int], names: Iterable[str]) -> Stacked:
        """The parameters `names` of some runs."""
        return self._chosen(self.values, indices, names)

    def removed_of(self, indices: Sequence[int], names: Iterable[str]) -> Stacked:
        """The entries that masks remove from them, where there are masks."""
        return self._chosen(self.removed, indices, [name for name in names if name in self.removed])

    def _chosen(self, values: Stacked, indices: Sequence[int], names: Iterable[str]) -> Stacked:
        chosen = torch.as_tensor(list(indices), device=self.accelerator.device)
        return {name: values[name][chosen] for name in names}


class Part:
    """The rows of one part of every run, on the device: a table, and the places of each run's rows in it."""

    def __init__(self, table: Table, places: dict[int, np.ndarray]) -> None:
        self.table, self.places = table, places


class _Lane:
    """One run in a stage: which rows come next, and what has become of it."""

    def __init__(self, index: int, run: Run, stage: Stage, part: Part) -> None:
        self.index, self.run, self.stage, self.places = index, run, stage, part.places[index]
        lengths = part.table.lengths[self.places].tolist()
        seed = mix(run.seed, stage.number)
        self.batches = LengthBucketedBatches(lengths, run.protocol.batch_size, seed=seed)
        self.course = Course(run.protocol, stage.learning_rate, stage.epochs * len(self.batches))
        self.keeper = Keeper([], run.protocol)
        self.epoch = self.step = 0
        self.losses: list[float] = []
        self._begun = run.times[stage.name]
        self._queue: list[list[int]] = []

    def next(self) -> np.ndarray:
        """The places of the next batch."""
        if not self._queue:
            self.epoch += 1
            self.batches.set_epoch(self.epoch)
            self._queue = list(self.batches)[::-1]
        self.step += 1
        batch: np.ndarray = self.places[self._queue.pop()]
        return batch

    @property
    def epoch_is_over(self) -> bool:
        return not self._queue

    @property
    def is_over(self) -> bool:
        last = self.epoch == self.stage.epochs or self.keeper.exhausted(self.epoch)
        return self.epoch_is_over and last

    def record(self, rate: float, scores: dict[str, float]) -> None:
        """Write a row of the history and start afresh."""
        seconds = self.run.times[self.stage.name]
        row: dict[str, Any] = {
            "stage": self.stage.number,
            "epoch": self.epoch,
            "step": self.step,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": rate,
            "seconds": seconds - self._begun,
            **{f"eval_{name}": value for name, value in scores.items()},
        }
        self.run.history.append(row)
        self.losses, self._begun = [], seconds


class StageOfBank:
    """One stage of all runs that have not failed: some parameters, some epochs, and the best of them."""

    def __init__(
        self,
        bank: Bank,
        stages: Sequence[Stage],
        training: Part,
        validation: Part | None,
        *,
        head_alone: bool = False,
    ) -> None:
        self.bank, self.name = bank, stages[0].name
        self.training, self.validation = training, validation
        self.lanes = [_Lane(index, bank.runs[index], stages[index], training) for index in bank.alive]
        bank.template.train_only(*stages[0].roles)
        own = bank.template.named_parameters()
        roles = tuple(f"{role}." for role in stages[0].roles)
        trained = [name for name in bank.values if name.startswith(roles) and own[name].requires_grad]
        # A stage that trains the head alone has the adapter off: what tunes the backbone must not come in.
        self._still = [] if head_alone else [name for name in bank.values if name not in trained]
        self.optimizer = StackedAdamW(
            bank.of(bank.alive, trained),
            [lane.course for lane in self.lanes],
            bank.removed_of(bank.alive, trained),
        )
        self._held = {
            index: bank.data[index].rows("validation") for index in (validation.places if validation else ())
        }
        self._pending: list[Tensor] = []
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._line_up()

    def _line_up(self) -> None:
        """After a change of the lanes: row `i` of everything that is stacked belongs to lane `i`."""
        self._fixed = self.bank.of([lane.index for lane in self.lanes], self._still)
        for row, lane in enumerate(self.lanes):
            lane.keeper.parameters = [self.optimizer.matrix[row]]

    def train(self) -> None:
        """Train until no run is left, and put the selected weights of each into the bank."""
        if not self.lanes:
            return
        bank, model, step = self.bank, self.bank.template.model, 0
        seeds = [lane.run.seed for lane in self.lanes]
        set_seed(int(np.random.SeedSequence([*seeds, self.lanes[0].stage.number]).generate_state(1)[0]) >> 1)
        total, title = max(lane.course.steps for lane in self.lanes), self.name.replace("_", " ")
        self._mark = time.perf_counter()
        model.train()
        with bar(total=total, description=f"{title} of {len(self.lanes)} runs", unit="step") as progress:
            while self.lanes:
                self._pending.append(self._step(step))
                step += 1
                ended = [lane for lane in self.lanes if lane.epoch_is_over]
                if ended or len(self._pending) >= LOOK_EVERY:
                    progress.update(len(self._pending))
                    self._look(step)
                    self._end_epochs([lane for lane in ended if lane.index not in bank.failed], step)
                    self._let_go()
        model.eval()

    def _step(self, step: int) -> Tensor:
        """One update of every run; their losses [runs]."""
        batches = [lane.next() for lane in self.lanes]
        counts = tuple(map(len, batches))
        # A short batch is filled up with a row that it has, which counts for nothing.
        places = np.stack([np.pad(batch, (0, max(counts) - len(batch)), mode="edge") for batch in batches])
        inputs, labels = self.training.table.take(places)
        with self.bank.accelerator.autocast():
            logits = self.bank.forward({**self.optimizer.leaves, **self._fixed}, inputs)
        losses = (_losses(logits, labels) * self._weights_of(counts)).sum(1)
        self.optimizer.step(losses, step)
        return losses.detach()

    def _weights_of(self, counts: tuple[int, ...]) -> Tensor:
        """[runs, rows]: each run's loss is the mean over the rows that it has."""
        if counts not in self._weights:
            weights = np.zeros((len(counts), max(counts)))
            for row, count in enumerate(counts):
                weights[row, :count] = 1 / count
            self._weights[counts] = torch.from_numpy(weights).to(self.optimizer.matrix)
        return self._weights[counts]

    def _look(self, step: int) -> None:
        """At the losses since the last look, for which the device is waited for. Not finite: the run has failed."""
        losses = torch.stack(self._pending).cpu().numpy()
        self._pending = []
        self._charge(self.name)
        for row, (lane, own) in enumerate(zip(self.lanes, losses.T.tolist(), strict=True)):
            lane.losses += own
            if bad := [place for place, loss in enumerate(own) if not math.isfinite(loss)]:
                back = len(own) - bad[0]
                rate = float(self.optimizer.rates[step - back, row])
                self.bank.failed[lane.index] = divergence(
                    lane.stage, lane.run.protocol, own[bad[0]], lane.epoch, lane.step - back + 1, rate
                )

    def _end_epochs(self, ended: list[_Lane], step: int) -> None:
        if not ended:
            return
        held = {} if self.validation is None else self.validation.places
        scored = [lane for lane in ended if lane.index in held]
        scores = dict(zip([lane.index for lane in scored], self._scores(scored), strict=True))
        self._charge("evaluation")
        for row, lane in enumerate(self.lanes):
            if lane not in ended:
                continue
            found = scores.get(lane.index, {})
            if found:
                lane.keeper.offer(lane.epoch, found[lane.run.metrics[0]], found["loss"])
            lane.record(float(self.optimizer.rates[step - 1, row]), found)

    def _scores(self, lanes: list[_Lane]) -> list[dict[str, float]]:
        if not lanes or self.validation is None:
            return []
        values = {name: leaf.detach() for name, leaf in self.optimizer.leaves.items()} | self._fixed
        if len(lanes) < len(self.lanes):
            rows = torch.tensor(
                [self.lanes.index(lane) for lane in lanes], device=self.optimizer.matrix.device
            )
            values = {name: value[rows] for name, value in values.items()}
        places = [self.validation.places[lane.index] for lane in lanes]
        found = predict(self.bank, values, self.validation.table, places)
        self.bank.template.model.train()
        return [
            lane.run.kind.score(lane.run.metrics, predicted, self._held[lane.index])
            for lane, predicted in zip(lanes, found, strict=True)
        ]

    def _let_go(self) -> None:
        """Of runs that are over, after putting their selected weights into the bank, and of those that failed."""
        staying = []
        for row, lane in enumerate(self.lanes):
            if lane.index in self.bank.failed:
                continue
            if not lane.is_over:
                staying.append(row)
                continue
            lane.run.selected[self.name] = lane.keeper.restore(lane.epoch)
            for name, value in self.optimizer.values(row).items():
                self.bank.values[name][lane.index].copy_(value)
        if len(staying) < len(self.lanes):
            self.lanes = [self.lanes[row] for row in staying]
            if self.lanes:
                self.optimizer.keep(staying)
                self._line_up()

    def _charge(self, name: str) -> None:
        """Each run its share of the time since the last call."""
        now = time.perf_counter()
        for lane in self.lanes:
            lane.run.times[name] += (now - self._mark) / len(self.lanes)
        self._mark = now


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [runs, rows] as the heads of transformers compute them: squared error where labels are floats."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return functional.mse_loss(logits[..., 0], labels, reduction="none")
    flat = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def predict(bank: Bank, values: Stacked, table: Table, places: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [rows, outputs] of every run at its `places`, in their order, in evaluation mode."""
    accelerator, runs = bank.accelerator, len(places)
    rows = bank.runs[0].protocol.eval_batch_size
    if accelerator.device.type != "cpu":
        rows = max(rows, EVALUATED)
    size = max(1, min(rows // runs, max(map(len, places))))
    orders = [np.argsort(-table.lengths[own], kind="stable") for own in places]
    found = []
    bank.template.model.eval()
    with torch.no_grad(), accelerator.autocast():
        for start in range(0, max(map(len, places)), size):
            wanted = np.arange(start, start + size)
            here = np.stack(
                [
                    own[order[np.minimum(wanted, len(own) - 1)]]
                    for own, order in zip(places, orders, strict=True)
                ]
            )
            inputs, _ = table.take(here)
            found.append(bank.forward(values, inputs).float())
        logits = torch.cat(found, 1).cpu().numpy()
    results = []
    for run, order in enumerate(orders):
        result = np.empty((len(order), logits.shape[2]), np.float32)
        result[order] = logits[run, : len(order)]
        results.append(result)
    return results
