"""`LayerPruner`, the widget: shows a `PruningState` with its scores, and turns what is pressed into events."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import ArgumentError, MissingExtraError
from hadamard_toolkit.plotting.export import Saved, save
from hadamard_toolkit.plotting.pruner import pruned_layers
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore, as_store
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.widgets import tables, views
from hadamard_toolkit.widgets.background import Background, Steps
from hadamard_toolkit.widgets.evaluation import ROWS, Score
from hadamard_toolkit.widgets.inputs import headless_code, profile_of, subjects
from hadamard_toolkit.widgets.orders import consensus_order, greedy_order
from hadamard_toolkit.widgets.pruned_adapter import pruned_adapter
from hadamard_toolkit.widgets.pruning_state import (
    Event,
    Keep,
    Preset,
    PruningState,
    Range,
    Redo,
    Reset,
    Threshold,
    Toggle,
    Undo,
)
from hadamard_toolkit.widgets.retrain import Retraining

try:
    import ipywidgets as widgets

    from hadamard_toolkit.widgets.panel import Panel
except ImportError as missing:
    raise MissingExtraError(
        f"LayerPruner needs {missing.name}; install it with: pip install hadamard_toolkit[notebooks]"
    ) from None

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Subject = Run | Attachment | tuple[PreTrainedModel, Attachment]

PROCESS_LOOK = 0.2  # seconds between looks at a retraining
OPENING = 4.0  # most seconds that opening spends on preparing flips; the rest is done while nothing happens


class LayerPruner(widgets.VBox):
    """Switch the layers of a trained adapter off and on, and see what the model loses and saves.

    Parameters
    ----------
    model_or_run: a stored `Run`, several of them (tasks side by side, under one set of switches), an `Attachment`, or a
        pair `(model, attachment)`.
    task: of an attachment its `Task` or its name; a run knows its own.
    tokenizer: of an attachment.
    rows, split: what is scored, see `Evaluation`.
    store: where retrained runs go (default: `runs`, the folder that the command line uses). Never the store that a run
        was read from, unless it is named here.
    reference: a store with measured removals, for the preset `consensus` (default: the store of the first run).
    spec: of an attachment, what it was trained by; retraining needs it.
    figures: folder of exported figures, see `ht.plotting.save`.
    ahead: whether to prepare the next flip: on opening, what the upper layers read with the lowest ones off (about two
        passes over the model, 4 seconds at most); then, while nothing else happens, the scores one flip away.

    Switching changes nothing for good: after every evaluation, and after an error, the model is as it was. `state` is
    the `PruningState` shown, `apply(event)` changes it, `settle()` waits for the scores, `scores()` returns them. An
    error in a callback is shown in the view; under pytest, or with `HADAMARD_DEBUG=1`, it is raised as well.
    """

    def __init__(
        self,
        model_or_run: Subject | Sequence[Run],
        task: Task | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rows: int = ROWS,
        split: str | None = None,
        store: RunStore | str | Path = "runs",
        reference: RunStore | str | Path | None = None,
        spec: RunSpec | None = None,
        figures: str | Path = "figures",
        ahead: bool = True,
        **options: Any,
    ) -> None:
        self.evaluations, self.specs, self._sources = subjects(
            model_or_run, task, tokenizer, spec, rows=rows, split=split, **options
        )
        places = self.evaluations[0].places
        for other in self.evaluations[1:]:
            if other.places != places:
                raise ArgumentError(
                    f"{other.name} has its adapter in other places than {self.evaluations[0].name}"
                )
        importance = {
            p: sum(e.importance[p] for e in self.evaluations) / len(self.evaluations) for p in places
        }
        self.state = PruningState.of(places, importance)
        self._store, self._rows = as_store(store), rows
        self._reference, self._figures = reference, figures
        self._without: dict[int, dict[Any, float]] = {}
        self._retrained: dict[int, tuple[Score, str]] = {}
        self._orders: dict[str, tuple[int, ...]] = {}
        self._job: Retraining | None = None
        self._closed = False
        self._background = Background(self._progress, self._show, lambda: self.panel.say("cancelled"))
        self._ahead = ahead
        for evaluation in self.evaluations:
            evaluation.score(places)
        until = time.monotonic() + OPENING
        if ahead:
            steps = chain.from_iterable(evaluation.prepare(places) for evaluation in self.evaluations)
            deque(takewhile(lambda _: time.monotonic() < until, steps), maxlen=0)
        self.panel = Panel(self.state, self)
        super().__init__([self.panel.box])
        self.add_class("hadamard-pruner")
        self._draw()
        self._background.fill(self._look_ahead())

    def __repr__(self) -> str:
        names = ", ".join(evaluation.name for evaluation in self.evaluations)
        return f"LayerPruner({names}; kept: {self.state.range_text})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the widget: stop all work, cancel a retraining, leave the model as it was."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        self.cancel()
        self._background.stop_idle()
        super().close()

    # state -----------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> PruningState:
        """Apply `event` to the state, show the new state, have it scored, and return it."""
        after = self.state.apply(event)
        if after != self.state:
            self.state = after
            self._background.stop_idle()
            self._retrained.clear()
            self.panel.say("")
            self._draw()
            self._later()
        else:
            self.panel.sync(self.state)
        return self.state

    def preset(self, name: str, k: int | None = None) -> PruningState:
        """Keep the k layers that a rule chooses: one of `pruning_state.PRESETS`, `"greedy"` or `"consensus"`."""
        if name == "greedy":
            self._greedily(k)
        elif name == "consensus":
            if name not in self._orders:
                tasks = {evaluation.task.name for evaluation in self.evaluations}
                self._orders[name] = consensus_order(self._reference_store(), tasks, self.state.layers)
            self.apply(Keep(self._last(self._orders[name], k)))
        else:
            self.apply(Preset(name, k if name == "top-k" else None))
        return self.state

    def _last(self, order: Sequence[int], k: int | None) -> tuple[int, ...]:
        """The k layers that come last in an order of removal."""
        count = len(self.state.layers) if k is None else k
        return tuple(sorted(order[len(order) - count :]))

    def _reference_store(self) -> RunStore:
        if self._reference is not None:
            return as_store(self._reference)
        if (folder := self._sources[0]) is None:
            raise ArgumentError(
                "reference=None is not allowed here: the consensus needs a store with measured runs"
            )
        return RunStore(folder)

    # numbers ---------------------------------------------------------------------------------------------------

    def settle(self) -> Self:
        """Compute the score of the state shown, if it is not known yet, and show it."""
        for evaluation in self.evaluations:
            evaluation.score(self.state.kept)
        self._draw()
        self._background.fill(self._look_ahead())
        return self

    def scores(self) -> pd.DataFrame:
        """What is kept against the unpruned model, a row per task: the fields of `Score`, `difference` and `split`."""
        return tables.score_table(self.evaluations, self.state.kept)

    def evidence(self) -> pd.DataFrame:
        """What is known of every part, by task: see `evidence.evidence_table`; `without` after `leave_one_out`."""
        return tables.evidence_of_tasks(self.evaluations, self._without)

    def leave_one_out(self) -> None:
        """Compute the change in score without each part, and show it beside its switch."""

        def work() -> Steps:
            for index, evaluation in enumerate(self.evaluations):
                self._without[index] = yield from evaluation.leaving_out()

        self._background.start(work(), lambda: self._guard(self._draw))

    def _greedily(self, k: int | None) -> None:
        """Backward elimination on the first task's rows, then keep the k layers that were removed last."""

        def work() -> Steps:
            if "greedy" not in self._orders:
                self._orders["greedy"] = yield from greedy_order(self.evaluations[0])

        def keep() -> None:
            self.apply(Keep(self._last(self._orders["greedy"], k)))

        self._background.start(work(), lambda: self._guard(keep))

    def _later(self) -> None:
        """Score the state shown: in steps where a loop runs, so that events come between; else at once."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.settle()
        else:
            self._background.fill(self._score())

    def _score(self) -> Iterator[None]:
        for evaluation in self.evaluations:
            yield from evaluation.steps(self.state.kept)
        self._draw()
        yield from self._look_ahead()

    def _look_ahead(self) -> Iterator[None]:
        if self._ahead:
            for evaluation in self.evaluations:
                yield from evaluation.prepare(self.state.kept)
            for evaluation in self.evaluations:
                yield from evaluation.flips(self.state.kept)

    # retraining ------------------------------------------------------------------------------------------------

    def pruned_specs(self) -> list[RunSpec]:
        """The specs that `retrain` runs, one per task."""
        specs = []
        for evaluation, spec in zip(self.evaluations, self.specs, strict=True):
            if spec is None:
                raise ArgumentError(
                    f"spec=None is not allowed here: retraining {evaluation.name} needs what it was trained by"
                )
            specs.append(replace(spec, adapter=pruned_adapter(spec.adapter, self.state)))
        return specs

    def retrain(self) -> None:
        """Train what is kept from scratch, task by task, in another process; show its score on the same rows."""
        specs, state = self.pruned_specs(), self.state

        def work() -> Steps:
            for index, spec in enumerate(specs):
                if spec not in self._store:
                    self._job = Retraining(spec, self._store)
                    while not self._job.finished:
                        stage, share = self._job.progress
                        yield f"retraining {spec.task}: {stage}", share
                    key = self._job.result()
                    self._job = None
                    if key is None:
                        return
                if self.state == state:
                    self._retrained[index] = (
                        self.evaluations[index].score_of(self._store.run(spec.key)),
                        f"run {spec.key}",
                    )

        self._background.start(work(), lambda: self._guard(self._draw), pause=PROCESS_LOOK)

    def cancel(self) -> None:
        """Stop the work in progress: a retraining, a greedy search, or leaving out one by one."""
        self._background.stop()
        if self._job is not None:
            self._job.cancel()

    def _progress(self, text: str, share: float | None) -> None:
        self.panel.progress(text, share)
        if share is None:  # the work has ended, one way or another
            self._job = None
            if not self._closed:
                self._later()

    # exporting -------------------------------------------------------------------------------------------------

    def code(self) -> str:
        """Python code that gives the same scores without a widget, with the call that would retrain as a comment."""
        return headless_code(self.state, self.evaluations, self.specs, self._sources, self._rows, self._store)

    def table(self) -> pd.DataFrame:
        """What `figure` draws: a row per task, layer and site, with the scores of the task in each."""
        return tables.figure_table(self.evidence(), self.scores(), self.state.kept)

    def figure(self, *, venue: str | None = None) -> Figure:
        """The state shown, as a figure for a paper."""
        return pruned_layers(self.table(), venue=venue)

    def export(self, name: str = "pruned_layers", *, folder: str | Path | None = None) -> Saved:
        """Write that figure with `ht.plotting.save`, and show where it went."""
        notes = {"kept": self.state.range_text, "runs": [spec.key for spec in self.specs if spec is not None]}
        folder, profile = folder or self._figures, profile_of(self.specs)
        saved = save(self.figure(), name, table=self.table(), folder=folder, profile=profile, notes=notes)
        self.panel.say(
            f"written: {saved.pdf.name}, {saved.png.name}, {saved.json.name} in {views.near(saved.pdf.parent)}"
        )
        return saved

    # view ------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """Show the state with its scores, or with previews marked as such."""
        kept = self.state.kept
        rows = []
        for index, evaluation in enumerate(self.evaluations):
            score, status = evaluation.at_hand(kept)
            retrained, run = self._retrained.get(index, (None, ""))
            rows.append(
                {
                    "task": evaluation.name,
                    "score": score,
                    "status": status,
                    "retrained": retrained,
                    "retrained_as": run,
                }
            )
        self.panel.show_numbers(views.numbers(rows, self.state.range_text))
        first = self.evaluations[0]
        self.panel.show_costs(views.costs(first.cost(kept), first.cost(self.state.places)))
        if all(e.known(kept) is not None for e in self.evaluations):
            tables = {e.name: e.flipped(kept) for e in self.evaluations}
            totals = {
                e.name: None if e.task.kind == "regression" else e.score(kept).changed
                for e in self.evaluations
            }
            self.panel.show_flips(views.flips(tables, totals))
        self.panel.show_code(views.code(self.code()))
        self.panel.show_evidence(self.evidence(), self.state)
        self.panel.sync(self.state)

    def _guard(self, action: Callable[[], object]) -> None:
        """Run a callback; an error is shown in the view, and raised under test."""
        try:
            action()
        except Exception as error:
            self._show(error)

    def _show(self, error: Exception) -> None:
        self.panel.say(" ".join(str(error).split()) or type(error).__name__, error=True)
        self.panel.sync(self.state)
        if "PYTEST_CURRENT_TEST" in os.environ or os.environ.get("HADAMARD_DEBUG", "0") not in ("", "0"):
            raise error

    def handle(self, name: str, value: Any = None) -> None:
        """Do what a control of the panel asks for by its name."""
        actions: dict[str, Callable[[], object]] = {
            "undo": lambda: self.apply(Undo()),
            "redo": lambda: self.apply(Redo()),
            "reset": lambda: self.apply(Reset()),
            "range": lambda: self.apply(Range(value)),
            "threshold": lambda: self.apply(Threshold(value)),
            "toggle": lambda: self.apply(Toggle(*value)),
            "preset": lambda: self.preset(*value),
            "leave one out": self.leave_one_out,
            "retrain": self.retrain,
            "cancel": self.cancel,
            "export": self.export,
        }
        self._guard(actions[name])
