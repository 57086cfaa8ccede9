"""One stage of a bank: in every step each run takes a step of its own, until it is done and leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional

from hadamard_toolkit.training.bank_optimizer import Course, StackedAdamW
from hadamard_toolkit.training.bank_rows import PartRows, stacked
from hadamard_toolkit.training.bank_state import BankState, select
from hadamard_toolkit.training.batching import LengthBucketedBatches, mix
from hadamard_toolkit.training.progress import bar
from hadamard_toolkit.training.stages import LOOK_EVERY, Keeper, Stage, TrainingState, divergence, history_row


class _RunInStage:
    """One run in a stage: its next rows, its losses, and its best epoch."""

    def __init__(self, index: int, state: TrainingState, stage: Stage, training: PartRows) -> None:
        self.index, self.state, self.stage, self.positions = index, state, stage, training.positions[index]
        lengths, seed = training.table.lengths[self.positions].tolist(), mix(state.seed, stage.number)
        self.batches = LengthBucketedBatches(lengths, state.protocol.batch_size, seed=seed)
        self.course = Course(state.protocol, stage.learning_rate, stage.epochs * len(self.batches))
        self.keeper = Keeper([], state.protocol)
        self.epoch = self.step = 0
        self.losses: list[float] = []
        self._seconds = state.times[stage.name]
        self._queue: list[list[int]] = []

    def next(self) -> np.ndarray:
        """The positions of the next batch."""
        if not self._queue:
            self.epoch += 1
            self.batches.set_epoch(self.epoch)
            self._queue = list(self.batches)[::-1]
        self.step += 1
        batch: np.ndarray = self.positions[self._queue.pop()]
        return batch

    @property
    def ends_epoch(self) -> bool:
        """Whether the last batch was that of an epoch."""
        return not self._queue

    @property
    def is_over(self) -> bool:
        return self.ends_epoch and (self.epoch == self.stage.epochs or self.keeper.exhausted(self.epoch))

    def end_epoch(self, rate: float, scores: dict[str, float]) -> None:
        """Write a row of the history, and offer the weights where there are `scores`."""
        seconds, self._seconds = self._seconds, self.state.times[self.stage.name]
        row = history_row(self.stage, self.epoch, self.step, self.losses, rate, self._seconds - seconds)
        self.state.history.append(row | {f"eval_{name}": value for name, value in scores.items()})
        self.losses = []
        if scores:
            self.keeper.offer(self.epoch, scores[self.state.metrics[0]], scores["loss"])


class BankStage:
    """One stage of all runs that have not failed: some parameters, some epochs, and the best of them."""

    def __init__(
        self,
        bank: BankState,
        stages: Sequence[Stage],
        training: PartRows,
        validation: PartRows | None,
    ) -> None:
        self.bank, self.training, self.validation = bank, training, validation
        self.name, self.number = stages[0].name, stages[0].number
        self.runs = [_RunInStage(index, bank.runs[index], stages[index], training) for index in bank.alive]
        self._labelled = {index: bank.data[index].rows("validation") for index in self._validated(self.runs)}
        bank.template.train_only(*stages[0].roles)
        parameters = bank.template.named_parameters()
        roles = tuple(f"{role}." for role in stages[0].roles)
        trained = [name for name in bank.values if name.startswith(roles) and parameters[name].requires_grad]
        # In stage one the adapter is off, and what tunes the backbone must not come in.
        alone = self.name == "stage_one"
        self._frozen = [] if alone else [name for name in bank.values if name not in trained]
        self.optimizer = StackedAdamW(
            select(bank.values, bank.alive, trained),
            [run.course for run in self.runs],
            select(bank.removed, bank.alive, trained),
            bank.forward.padding,
        )
        self._pending: list[Tensor] = []
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._assign_rows()

    def _assign_rows(self) -> None:
        """After a change of the runs: row `i` of everything that is stacked belongs to run `i`."""
        self._fixed = select(self.bank.values, [run.index for run in self.runs], self._frozen)
        for row, run in enumerate(self.runs):
            run.keeper.parameters = [self.optimizer.matrix[row]]

    def _validated(self, runs: Sequence[_RunInStage]) -> list[int]:
        """The indices of those of `runs` that have validation rows."""
        return [run.index for run in runs if self.validation and run.index in self.validation.positions]

    def train(self) -> None:
        """Train until every run is done, and put the selected weights of each into the bank."""
        seeds = [*(run.state.seed for run in self.runs), self.number]
        set_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]) >> 1)
        total = max(run.course.steps for run in self.runs)
        title = f"{self.name.replace('_', ' ')} of {len(self.runs)} runs"
        self._charged = time.perf_counter()
        step, model = 0, self.bank.template.model
        model.train()
        with bar(total=total, description=title, unit="step") as progress:
            while self.runs:
                self._pending.append(self._step(step))
                step += 1
                ended = [run for run in self.runs if run.ends_epoch]
                if ended or len(self._pending) >= LOOK_EVERY:
                    progress.update(len(self._pending))
                    self._look(step)
                    self._end_epochs([run for run in ended if run.index not in self.bank.failed], step)
                    self._dismiss()
        model.eval()

    def _step(self, step: int) -> Tensor:
        """One update of every run; their losses [runs]."""
        batches = [run.next() for run in self.runs]
        counts = tuple(map(len, batches))
        inputs, labels = self.training.table.take(stacked(batches, max(counts)))
        with self.bank.accelerator.autocast():
            logits = self.bank.forward({**self.optimizer.leaves, **self._fixed}, inputs)
        losses = (_losses(logits, labels) * self._weights_of(counts)).sum(1)
        self.optimizer.step(losses, step)
        return losses.detach()

    def _weights_of(self, counts: tuple[int, ...]) -> Tensor:
        """[runs, rows]: each run's loss is the mean over its own rows; what fills up its batch counts for nothing."""
        if counts not in self._weights:
            weights = np.array([[1 / n] * n + [0.0] * (max(counts) - n) for n in counts])
            self._weights[counts] = torch.from_numpy(weights).to(self.optimizer.matrix)
        return self._weights[counts]

    def _look(self, step: int) -> None:
        """Read the losses since the last look, which waits for the device. A run with one that is not finite fails."""
        losses = torch.stack(self._pending).cpu().numpy()
        self._pending = []
        self._charge(self.name)
        for row, (run, own) in enumerate(zip(self.runs, losses.T.tolist(), strict=True)):
            run.losses += own
            bad = next((place for place, loss in enumerate(own) if not math.isfinite(loss)), None)
            if bad is not None:
                back = len(own) - bad
                rate = float(self.optimizer.rates[step - back, row])
                self.bank.failed[run.index] = divergence(
                    run.stage, run.state.protocol, own[bad], run.epoch, run.step - back + 1, rate
                )

    def _end_epochs(self, ended: list[_RunInStage], step: int) -> None:
        if not ended:
            return
        scores = self._scores(ended)
        self._charge("evaluation")
        for run in ended:
            rate = float(self.optimizer.rates[step - 1, self.runs.index(run)])
            run.end_epoch(rate, scores.get(run.index, {}))

    def _scores(self, ended: list[_RunInStage]) -> dict[int, dict[str, float]]:
        """The scores on the validation rows, for runs that have some."""
        indices = self._validated(ended)
        if self.validation is None or not indices:
            return {}
        values = {name: leaf.detach() for name, leaf in self.optimizer.leaves.items()} | self._fixed
        if len(indices) < len(self.runs):
            values = select(
                values, [row for row, run in enumerate(self.runs) if run.index in indices], values
            )
        predictions = self.bank.predict(values, self.validation, indices)
        self.bank.template.model.train()
        states = [self.bank.runs[index] for index in indices]
        return {
            index: state.kind.score(state.metrics, logits, self._labelled[index])
            for index, state, logits in zip(indices, states, predictions, strict=True)
        }

    def _dismiss(self) -> None:
        """Let go of runs that failed, and of those that are over once their selected weights are in the bank."""
        staying = []
        for row, run in enumerate(self.runs):
            if run.index in self.bank.failed:
                continue
            if not run.is_over:
                staying.append(row)
                continue
            run.state.selected[self.name] = run.keeper.restore(run.epoch)
            for name, leaf in self.optimizer.leaves.items():
                self.bank.values[name][run.index].copy_(leaf.detach()[row])
        if len(staying) < len(self.runs):
            self.runs = [self.runs[row] for row in staying]
            if self.runs:
                self.optimizer.keep(staying)
                self._assign_rows()

    def _charge(self, name: str) -> None:
        """Add to the times of each run its share of the time since the last call."""
        now = time.perf_counter()
        for run in self.runs:
            run.state.times[name] += (now - self._charged) / len(self.runs)
        self._charged = now


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [runs, rows] as the heads of transformers compute them: squared error where labels are floats."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return functional.mse_loss(logits[..., 0], labels, reduction="none")
    flat = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape)
