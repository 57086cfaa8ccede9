"""Answers that are spans of a text: sliding windows over long contexts, and the best span over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.tasks.base import SPAN_COLUMNS, check_rows
from hadamard_toolkit.training.batching import Batch, Padding, Rows, Source
from hadamard_toolkit.training.evaluation import collect_in_evaluation, inputs_of
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.squad_metrics import compare

LONGEST_ANSWER = 30  # tokens; longer ones are never predicted, as in BERT's own script
LONGEST_QUESTION = 64  # tokens; the rest of a longer one is cut off


@dataclass(frozen=True)
class Questions:
    """Questions and the windows over their contexts. As rows of a `Source` they are windows.

    Attributes
    ----------
    ids, contexts, golds: of each question its id, its context, and every answer that people gave.
    truth: [questions, 2] where the first of these starts and ends, in characters.
    inputs: `inputs[key][window]`, the token ids and what goes with them.
    offsets: of each window [context tokens, 2] where each token starts and ends in the context, in characters.
    labels: [windows, 4] the first and last token of the first answer ([CLS] twice where the window lacks it), and
        where the context begins and ends (exclusive), in tokens of the window.
    owner: [windows] the question of each window, ascending; every question has one or more.
    """

    ids: list[str]
    contexts: list[str]
    golds: list[list[str]]
    truth: np.ndarray
    inputs: dict[str, list[np.ndarray]]
    offsets: list[np.ndarray]
    labels: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.owner)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "row": row,
                "labels": self.labels[row],
                **{key: values[row] for key, values in self.inputs.items()},
            }
            for row in rows
        ]

    @property
    def lengths(self) -> list[int]:
        """Tokens per window."""
        return [len(ids) for ids in self.inputs["input_ids"]]

    def select(self, questions: Sequence[int] | np.ndarray) -> Questions:
        """The questions at these positions, in this order, with their windows."""
        first = np.searchsorted(self.owner, np.arange(len(self.ids) + 1))
        parts = [np.arange(first[q], first[q + 1]) for q in questions]
        windows = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return Questions(
            [self.ids[q] for q in questions],
            [self.contexts[q] for q in questions],
            [self.golds[q] for q in questions],
            self.truth[np.asarray(questions, np.int64)],
            {key: [values[w] for w in windows] for key, values in self.inputs.items()},
            [self.offsets[w] for w in windows],
            self.labels[windows],
            np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        )


class Spans:
    """The strategy for tasks of kind `span`, for the loop (`kinds.Kind`).

    A context longer than `protocol.max_length` leaves room for is read in windows that share `protocol.stride` tokens.
    Training sees every window; one without the answer points at [CLS]. Predictions are float64 [questions, 4]: where
    the answer starts and ends in the context (characters), its score (start logit plus end logit, the largest over all
    windows and all spans of at most 30 context tokens), and the mean loss of the windows.
    """

    cacheable = False

    def __init__(
        self, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, protocol: Protocol
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(tokenizer).__name__} does not say where its tokens stand in the text; a span task needs that"
            )
        self.tokenizer, self.max_length = tokenizer, protocol.max_length
        self.stride = protocol.max_length // 3 if protocol.stride is None else protocol.stride
        self._pad = Padding(tokenizer)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        return self._pad(rows)

    def encode(self, rows: Dataset) -> Questions:
        check_rows(rows, SPAN_COLUMNS, "span", 0, "span task")
        contexts, answers = list(rows["context"]), list(rows["answers"])
        encoded = self.tokenizer(
            self._short(list(rows["question"])),
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owner = np.asarray(encoded.pop("overflow_to_sample_mapping"))
        every = [np.asarray(window).reshape(-1, 2) for window in encoded.pop("offset_mapping")]
        bounds = [_context(encoded.sequence_ids(window)) for window in range(len(owner))]
        offsets = [window[begin:end] for window, (begin, end) in zip(every, bounds, strict=True)]
        truth = np.array([[a["answer_start"][0], a["answer_start"][0] + len(a["text"][0])] for a in answers])
        inputs = {key: [np.asarray(ids, np.int32) for ids in values] for key, values in encoded.items()}
        places = []
        for window, (begin, end) in enumerate(bounds):
            start, stop = truth[owner[window]]
            found = _locate(offsets[window], contexts[owner[window]], start, stop)
            nowhere = self._nowhere(inputs["input_ids"][window])
            first, last = (nowhere, nowhere) if found is None else (begin + found[0], begin + found[1])
            places.append((first, last, begin, end))
        ids = list(rows["id"]) if "id" in rows.column_names else [str(row) for row in range(len(rows))]
        golds = [list(answer["text"]) for answer in answers]
        return Questions(ids, contexts, golds, truth, inputs, offsets, np.asarray(places), owner)

    def source(self, rows: Any) -> Source:
        return Source(rows, self.collate)

    def targets(self, batch: Batch) -> Batch:
        return {"start_positions": batch["labels"][:, 0], "end_positions": batch["labels"][:, 1]}

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        def step(batch: Batch) -> Tensor:
            output, places = model(**inputs_of(batch)), batch["labels"]
            start, end = output.start_logits.float(), output.end_logits.float()
            loss = functional.cross_entropy(start, places[:, 0], reduction="none")
            loss = (loss + functional.cross_entropy(end, places[:, 1], reduction="none")) / 2
            return torch.cat([best_spans(start, end, places[:, 2:]), loss.unsqueeze(1)], dim=1)

        found = collect_in_evaluation(accelerator, model, source, batch_size, step)
        assert isinstance(source.rows, Questions)
        return _best_windows(source.rows, found)

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        _, found = self.by_row(predictions, rows)
        return {
            **{name: float(found[name].mean()) for name in names},
            "loss": float(predictions[:, 3].mean()),
        }

    def truth(self, rows: Any) -> np.ndarray:
        truth: np.ndarray = rows.truth
        return truth

    def by_row(self, predictions: np.ndarray, rows: Any) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        places = predictions[:, :2].astype(np.int64)
        texts = [context[a:b] for context, (a, b) in zip(rows.contexts, places, strict=True)]
        return dict(zip(rows.ids, texts, strict=True)), compare(texts, rows.golds)

    def _short(self, questions: list[str]) -> list[str]:
        """The questions, cut where they would leave the windows no way forward."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = min(LONGEST_QUESTION, (self.max_length - special - self.stride) // 2)
        if longest < 1:
            raise ArgumentError(
                f"max_length={self.max_length!r} is not allowed with stride={self.stride}; it must be >= "
                f"{self.stride + special + 2}, so that every window moves on"
            )
        encoded = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
        ends = [
            offsets[longest - 1][1] if len(offsets) > longest else None
            for offsets in encoded["offset_mapping"]
        ]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]

    def _nowhere(self, ids: np.ndarray) -> int:
        """The place of [CLS], or the first one where a tokenizer has none."""
        return (
            int(np.argmax(ids == self.tokenizer.cls_token_id))
            if self.tokenizer.cls_token_id is not None
            else 0
        )


def best_spans(start: Tensor, end: Tensor, bounds: Tensor, longest: int = LONGEST_ANSWER) -> Tensor:
    """First token, last token and score of the best span in each row: float32 [rows, 3].

    `start` and `end` are logits [rows, tokens]; `bounds` [rows, 2] begin and end (exclusive) of where a span may lie. A
    span has one to `longest` tokens and the score start + end; of equals the shortest wins, then the first. A row
    without room has the score -inf.
    """
    places = torch.arange(start.shape[1], device=start.device)
    outside = (places < bounds[:, :1]) | (places >= bounds[:, 1:])
    start, end = start.float().masked_fill(outside, -torch.inf), end.float().masked_fill(outside, -torch.inf)
    best = start.new_full((len(start),), -torch.inf)
    first = last = torch.zeros_like(best, dtype=torch.long)
    for more in range(min(longest, start.shape[1])):
        score, place = (start[:, : start.shape[1] - more] + end[:, more:]).max(dim=1)
        better = score > best
        best = torch.where(better, score, best)
        first, last = torch.where(better, place, first), torch.where(better, place + more, last)
    return torch.stack([first.float(), last.float(), best], dim=1)


def _best_windows(questions: Questions, found: np.ndarray) -> np.ndarray:
    """Predictions [questions, 4] from the best span, its score and the loss of each window [windows, 4]."""
    predictions = np.zeros((len(questions.ids), 4))
    predictions[:, 2] = -np.inf
    counts = np.bincount(questions.owner, minlength=len(predictions))
    predictions[:, 3] = np.bincount(questions.owner, found[:, 3], len(predictions)) / counts
    for window, (first, last, score, _) in enumerate(found):
        question, begin = questions.owner[window], questions.labels[window, 2]
        if score > predictions[question, 2]:
            offsets = questions.offsets[window]
            predictions[question, :3] = offsets[int(first) - begin, 0], offsets[int(last) - begin, 1], score
    return predictions


def _context(sequences: list[int | None]) -> tuple[int, int]:
    """Begin and end (exclusive) of the context among the tokens of a window."""
    inside = [place for place, sequence in enumerate(sequences) if sequence == 1]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _locate(offsets: np.ndarray, context: str, start: int, stop: int) -> tuple[int, int] | None:
    """The context tokens of a window that hold the characters `start` to `stop`, or None where one is missing."""
    answer = context[start:stop]
    start, stop = start + len(answer) - len(answer.lstrip()), stop - len(answer) + len(answer.rstrip())
    if start >= stop or not len(offsets) or offsets[0, 0] > start or offsets[-1, 1] < stop:
        return None
    first = int(
        np.searchsorted(offsets[:, 1], start, side="right")
    )  # the first token that ends behind the start
    last = (
        int(np.searchsorted(offsets[:, 0], stop, side="left")) - 1
    )  # the last token that starts before the end
    return (first, last) if first <= last else None
