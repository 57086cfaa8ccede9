"""Scores of a task with only some parts of an adapter at work, on held-out rows. No widget is needed."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.parts import LayerSite, chosen_sites
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError, check_choice, check_range
from hadamard_toolkit.measurements.layer_cache import LayerCache
from hadamard_toolkit.studies.paired_difference import paired_interval
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.training import evaluation as scoring
from hadamard_toolkit.training.batching import Padding, tokenise
from hadamard_toolkit.widgets.evidence import cost_table, evidence_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hadamard_toolkit.runs.record import Run

ROWS, PREVIEW = 256, 24
PREPARED = 2  # lowest layers whose combinations are all prepared; one more would double that work
LONGEST_TEXT = 160  # characters of an example that are shown


@dataclass(frozen=True)
class Score:
    """The metric on `n` rows with some parts kept (`value`) and with all (`full`), on the same rows.

    `low` and `high` bound value − full, see `intervals.paired_interval`. `changed` predictions differ in class (of
    a regression: 0); `gained` rows became right, `lost` wrong. `loss` is the mean loss with what is kept.
    """

    metric: str
    value: float
    full: float
    low: float
    high: float
    n: int
    changed: int
    gained: int
    lost: int
    loss: float

    @property
    def difference(self) -> float:
        """value − full."""
        return self.value - self.full


class Evaluation:
    """A trained attachment on held-out rows of its task, with any of its parts switched off and the head as trained.

    Parameters
    ----------
    rows: so many rows of the split at most, spread evenly over it; `preview`: so many of these for a quick look.
    split: `"validation"` (the task's own validation split; of a run, the rows that it held out) or `"test"`. None: the
        former where there is one. Layers that were chosen by test scores have no test score any more.
    positions: of the rows in `split`, or None for all of it; `name` of the whole in tables (default: the task's).

    Every score is remembered by what is kept, so the same state is computed once.
    """

    def __init__(
        self,
        attachment: Attachment,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int = ROWS,
        preview: int = PREVIEW,
        split: str | None = None,
        positions: Collection[int] | None = None,
        max_length: int = 128,
        batch_size: int = 16,
        name: str | None = None,
    ) -> None:
        check_range("rows", rows, least=1)
        check_range("preview", preview, least=1)
        if task.kind == "span":
            raise UnsupportedError(
                f"task {task.name!r} is of kind 'span'; layers are compared on classes and numbers"
            )
        self.attachment, self.task, self.name = attachment, task, name or task.name
        self.split = split or ("validation" if "validation" in task.splits else "test")
        check_choice("split", self.split, list(task.splits))
        whole = (
            np.arange(len(task.splits[self.split]))
            if positions is None
            else np.sort(np.asarray(list(positions)))
        )
        self.positions = whole[_evenly(len(whole), rows)]
        self._rows = task.splits[self.split].select(self.positions)
        examples = tokenise(self._rows, task.text_columns, tokenizer, max_length)
        self.labels = examples.labels
        padded = Padding(tokenizer)(examples.__getitems__(range(len(examples))))
        inputs = scoring.inputs_of(padded)
        self._quick = _evenly(len(self.labels), preview)
        self._cache = LayerCache(attachment, inputs, batch_size=batch_size, first=self._quick)
        self.places: tuple[LayerSite, ...] = self._cache.places
        if not self.places:
            raise ArgumentError(
                f"adapter={attachment.adapter} puts nothing into the layers; there is nothing to switch"
            )
        self._logits: dict[tuple[bool, frozenset[LayerSite]], np.ndarray] = {}
        self._scores: dict[tuple[bool, frozenset[LayerSite]], Score] = {}

    @classmethod
    def of_run(cls, run: Run, *, split: str | None = None, **options: Any) -> Self:
        """Evaluate a stored run: its weights, by default on the rows that it held out itself."""
        from hadamard_toolkit.runs.run import live
        from hadamard_toolkit.tasks.registry import load_task

        chosen = split or ("validation" if "validation" in run.predictions else "test")
        check_choice("split", chosen, list(run.predictions))
        if "logits" not in run.predictions[chosen]:
            raise UnsupportedError(
                f"run {run.key} has no logits for {chosen!r}; layers are compared on classes and numbers"
            )
        _, tokenizer, attachment = live(run)
        options.setdefault("max_length", run.spec.protocol.max_length)
        options.setdefault("name", run.spec.task)
        evaluation = cls(
            attachment,
            load_task(run.spec.task),
            tokenizer,
            split=run.info["rows"][chosen]["split"],
            positions=run.predictions[chosen]["rows"],
            **options,
        )
        evaluation.split = chosen  # a run may call rows of another split its validation rows
        return evaluation

    # scores ----------------------------------------------------------------------------------------------------

    def score(self, kept: Collection[int | LayerSite]) -> Score:
        """The score with the adapter at work in `kept` only: layers, or `(layer, site)` pairs."""
        return self._score(kept, quick=False)

    def preview(self, kept: Collection[int | LayerSite]) -> Score:
        """The same score on a few of the rows."""
        return self._score(kept, quick=True)

    def steps(self, kept: Collection[int | LayerSite]) -> Iterator[None]:
        """Do the work of `score` one batch per step; afterwards `score` returns at once."""
        places = chosen_sites(self.attachment, kept)
        if (False, places) not in self._logits:
            for logits in self._cache.steps(places):
                if logits is not None:
                    self._logits[False, places] = logits
                yield
        self.score(places)

    def prepare(self, kept: Collection[int | LayerSite]) -> Iterator[None]:
        """Compute, in steps, what the layers above the lowest ones read after each flip; see `LayerCache.prepare`.

        Afterwards a score with one layer or site flipped, or with any of the lowest layers, skips the lowest layers.
        """
        places = chosen_sites(self.attachment, kept)
        layers = sorted({layer for layer, _ in self.places})[:PREPARED]
        single = [self._flip(places, layer) for layer in layers]
        sites = [places ^ {place} for place in self.places if place[0] in layers]
        pairs = [self._flip(self._flip(places, one), other) for one, other in combinations(layers, 2)]
        for state in (places, *single, *sites, *pairs):
            yield from self._cache.prepare(state, layers[-1] + 1)

    def flips(self, kept: Collection[int | LayerSite]) -> Iterator[None]:
        """Compute, in steps, the score after each flip of a layer; low layers first, as their scores take longest."""
        places = chosen_sites(self.attachment, kept)
        for layer in sorted({layer for layer, _ in self.places}):
            yield from self.steps(self._flip(places, layer))

    def _flip(self, kept: frozenset[LayerSite], layer: int) -> frozenset[LayerSite]:
        """`kept` with the layer switched off, or on where nothing of it was kept."""
        whole = {place for place in self.places if place[0] == layer}
        return kept - whole if kept & whole else kept | whole

    def known(self, kept: Collection[int | LayerSite]) -> Score | None:
        """The score of `kept` if it was computed before, else None."""
        return self._scores.get((False, chosen_sites(self.attachment, kept)))

    def at_hand(self, kept: Collection[int | LayerSite]) -> tuple[Score, str]:
        """The score if it is known, else a preview, and the words that say which of them it is."""
        if (score := self.known(kept)) is not None:
            return score, f"up to date, {self.split} rows"
        score = self.preview(kept)
        return score, f"stale: preview on {score.n} rows"

    def logits(self, kept: Collection[int | LayerSite]) -> np.ndarray:
        """Logits [rows, outputs] with the adapter at work in `kept` only."""
        return self._answers(chosen_sites(self.attachment, kept), quick=False)

    def _score(self, kept: Collection[int | LayerSite], *, quick: bool) -> Score:
        places = chosen_sites(self.attachment, kept)
        if (quick, places) not in self._scores:
            labels = self.labels[self._quick] if quick else self.labels
            now, base = self._answers(places, quick), self._answers(frozenset(self.places), quick)
            self._scores[quick, places] = compare(self.task.metric, now, base, labels)
        return self._scores[quick, places]

    def _answers(self, places: frozenset[LayerSite], quick: bool) -> np.ndarray:
        if (whole := self._logits.get((False, places))) is not None:
            return whole[self._quick] if quick else whole
        if (quick, places) not in self._logits:
            self._logits[quick, places] = self._cache.logits(places, first=quick)
        return self._logits[quick, places]

    # examples --------------------------------------------------------------------------------------------------

    def score_of(self, run: Run) -> Score:
        """Score another run, such as a retrained one, on the rows shown; with the same seed it held out the same ones.

        Raises `DataError` if it has no predictions for them.
        """
        part = run.predictions.get(self.split, {"rows": np.empty(0), "logits": np.empty((0, 1))})
        places = {int(row): place for place, row in enumerate(part["rows"])}
        if not all(int(row) in places for row in self.positions):
            raise DataError(f"run {run.key} has no predictions for the rows shown here")
        logits = part["logits"][[places[int(row)] for row in self.positions]]
        return compare(self.task.metric, logits, self.logits(self.places), self.labels)

    def flipped(self, kept: Collection[int | LayerSite], *, most: int = 10) -> pd.DataFrame:
        """The rows whose prediction changes most: `row`, `text`, `label`, `before`, `after`, `change`.

        Of a classification those whose class changes, `change` being that of the probability of the old class; of a
        regression any rows, by the size of the change.
        """
        now, base = self.logits(kept), self._answers(frozenset(self.places), False)
        columns = ["row", "text", "label", "before", "after", "change"]
        if self.task.kind == "regression":
            change = now[:, 0] - base[:, 0]
            chosen = [int(row) for row in np.argsort(-np.abs(change), kind="stable")[:most] if change[row]]
            words: list[tuple[str, ...]] = [
                (f"{self.labels[r]:.2f}", f"{base[r, 0]:.2f}", f"{now[r, 0]:.2f}") for r in chosen
            ]
        else:
            old, new = base.argmax(1), now.argmax(1)
            each = np.arange(len(old))
            change = _probabilities(now)[each, old] - _probabilities(base)[each, old]
            flips = np.flatnonzero(old != new)
            chosen = [int(row) for row in flips[np.argsort(change[flips], kind="stable")][:most]]
            words = [tuple(self._label(values[r]) for values in (self.labels, old, new)) for r in chosen]
        rows = [
            (int(self.positions[r]), self._text(r), *values, float(change[r]))
            for r, values in zip(chosen, words, strict=True)
        ]
        return pd.DataFrame(rows, columns=columns)

    def _label(self, value: Any) -> str:
        return self.task.labels[int(value)] if self.task.labels else str(value)

    def _text(self, row: int) -> str:
        text = " / ".join(str(self._rows[row][column]) for column in self.task.text_columns)
        return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"

    # evidence --------------------------------------------------------------------------------------------------

    @cached_property
    def evidence(self) -> pd.DataFrame:
        """What training did to each part; see `evidence.evidence_table`."""
        return evidence_table(self.attachment)

    @property
    def importance(self) -> dict[LayerSite, float]:
        """One number per part; larger is more important."""
        rows = self.evidence.itertuples()
        return {(int(row.layer), str(row.site)): float(row.importance) for row in rows}  # type: ignore[arg-type]

    def cost(self, kept: Collection[int | LayerSite]) -> pd.Series:
        """Parameters and multiply-adds; see `evidence.cost_table`."""
        return cost_table(self.attachment, chosen_sites(self.attachment, kept))

    def leave_one_out(self) -> pd.DataFrame:
        """What each part is worth to the whole: a row per layer and site with the score without it.

        Columns: `layer`, `site`, `score`, `difference` (to everything kept), `low`, `high`, `n`.
        """
        rows = []
        for layer, site in self.places:
            score = self.score(frozenset(self.places) - {(layer, site)})
            rows.append((layer, site, score.value, score.difference, score.low, score.high, score.n))
        return pd.DataFrame(rows, columns=["layer", "site", "score", "difference", "low", "high", "n"])

    def leaving_out(self) -> Generator[tuple[str, float], None, dict[LayerSite, float]]:
        """The differences of `leave_one_out` by place, a batch per step; yields a description and the share done."""
        differences: dict[LayerSite, float] = {}
        for place in self.places:
            without = frozenset(self.places) - {place}
            for _ in self.steps(without):
                yield f"leaving out one part at a time on {self.name}", len(differences) / len(self.places)
            differences[place] = self.score(without).difference
        return differences

    def greedy(self) -> Iterator[int]:
        """Backward elimination on these rows: each time, remove the layer whose removal costs the score least.

        Ties go to the smaller loss, then to the lower layer, as in `studies.layers.greedy_elimination`. An iterator,
        because each layer takes as many evaluations as there are layers left.
        """
        kept = sorted({layer for layer, _ in self.places})
        while kept:
            scores = {layer: self.score([other for other in kept if other != layer]) for layer in kept}
            removed = max(kept, key=lambda layer: (scores[layer].value, -scores[layer].loss, -layer))
            kept.remove(removed)
            yield removed


def compare(metric: str, now: np.ndarray, base: np.ndarray, labels: np.ndarray) -> Score:
    """Compare two sets of logits [rows, outputs] on the same rows."""
    regression = metric in ("pearson", "spearman")
    value, full = (scoring.score((metric,), logits, labels) for logits in (now, base))
    low, high = paired_interval(metric, now, base, labels)
    right, was_right = (
        np.zeros(len(labels), bool) if regression else x.argmax(1) == labels for x in (now, base)
    )
    changed = 0 if regression else int((now.argmax(1) != base.argmax(1)).sum())
    return Score(
        metric=metric,
        value=value[metric],
        full=full[metric],
        low=low,
        high=high,
        n=len(labels),
        changed=changed,
        gained=int((right & ~was_right).sum()),
        lost=int((was_right & ~right).sum()),
        loss=value["loss"],
    )


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` positions, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
