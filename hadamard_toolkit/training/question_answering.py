"""Extractive question answering: sliding windows over long contexts, and the best span over all of them."""

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
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.tasks.base import SPAN_COLUMNS, check_rows
from hadamard_toolkit.training.batching import Source, TokenRows
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.squad_metrics import compare
from hadamard_toolkit.training.task_types import Kind

LONGEST_ANSWER = 30  # tokens; longer ones are never predicted, as in BERT's own script
LONGEST_QUESTION = 64  # tokens; the rest of a longer one is cut off


@dataclass(frozen=True)
class Questions(TokenRows):
    """Questions, and windows over their contexts. Its token rows are the windows.

    Attributes
    ----------
    labels: [windows, 4] the first and last token of the first answer ([CLS] twice where the window lacks it), and
        where the context begins and ends (exclusive), in tokens of the window.
    owner: [windows] the question of each window, ascending; every question has one or more.
    offsets: for each window [context tokens, 2], where each token starts and ends in the context, in characters.
    ids, contexts, golds: of each question its id, its context, and every answer that people gave.
    truth: [questions, 2] where the first of these answers starts and ends, in characters.
    """

    owner: np.ndarray
    offsets: list[np.ndarray]
    ids: list[str]
    contexts: list[str]
    golds: list[list[str]]
    truth: np.ndarray

    def select(self, questions: Sequence[int] | np.ndarray) -> Questions:
        """The questions at these positions, in this order, with their windows."""
        order = np.asarray(questions, np.int64)
        first = np.searchsorted(self.owner, np.arange(len(self.ids) + 1))
        counts = np.diff(first)[order]
        windows = [window for question in order for window in range(first[question], first[question + 1])]
        return Questions(
            inputs={key: [values[window] for window in windows] for key, values in self.inputs.items()},
            labels=self.labels[windows],
            owner=np.repeat(np.arange(len(order)), counts),
            offsets=[self.offsets[window] for window in windows],
            ids=[self.ids[question] for question in order],
            contexts=[self.contexts[question] for question in order],
            golds=[self.golds[question] for question in order],
            truth=self.truth[order],
        )


class Spans(Kind):
    """Extractive question answering: the answer is a span of the context.

    A context too long for `protocol.max_length` is read in windows that share `protocol.stride` tokens. Training sees
    every window; one without the answer points at [CLS]. Predictions are float64 [questions, 4]: where the answer
    starts and ends in the context (characters), its score (start logit plus end logit, the largest over all windows
    and all spans of at most 30 context tokens), and the mean loss of the windows.
    """

    def __init__(
        self, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, protocol: Protocol
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(tokenizer).__name__} does not say where its tokens stand in the text; a span task needs that"
            )
        super().__init__(tokenizer, protocol.max_length)
        self.stride = protocol.max_length // 3 if protocol.stride is None else protocol.stride

    def encode(self, rows: Dataset) -> Questions:
        check_rows(rows, SPAN_COLUMNS, "span", 0, "span task")
        contexts, answers = list(rows["context"]), list(rows["answers"])
        encoded = self.tokenizer(
            self._shortened(list(rows["question"])),
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owner = np.asarray(encoded.pop("overflow_to_sample_mapping"))
        all_offsets = encoded.pop("offset_mapping")
        inputs = {key: [np.asarray(ids, np.int32) for ids in values] for key, values in encoded.items()}
        truth = np.array([[a["answer_start"][0], a["answer_start"][0] + len(a["text"][0])] for a in answers])
        offsets, labels = [], []
        for window, question in enumerate(owner):
            begin, end = _context(encoded.sequence_ids(window))
            offsets.append(np.asarray(all_offsets[window]).reshape(-1, 2)[begin:end])
            span = _locate(offsets[-1], contexts[question], *truth[question])
            cls = self._cls(inputs["input_ids"][window])
            labels.append((*((cls, cls) if span is None else (begin + span[0], begin + span[1])), begin, end))
        return Questions(
            inputs=inputs,
            labels=np.asarray(labels),
            owner=owner,
            offsets=offsets,
            ids=list(rows["id"]) if "id" in rows.column_names else [str(row) for row in range(len(rows))],
            contexts=contexts,
            golds=[list(answer["text"]) for answer in answers],
            truth=truth,
        )

    def targets(self, batch: Batch) -> Batch:
        return {"start_positions": batch["labels"][:, 0], "end_positions": batch["labels"][:, 1]}

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        assert isinstance(source.rows, Questions)
        return _best_windows(source.rows, super().predict(accelerator, model, source, batch_size))

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        output, labels = model(**inputs_of(batch)), batch["labels"]
        start, end = output.start_logits.float(), output.end_logits.float()
        loss = functional.cross_entropy(start, labels[:, 0], reduction="none")
        loss = (loss + functional.cross_entropy(end, labels[:, 1], reduction="none")) / 2
        return torch.cat([best_spans(start, end, labels[:, 2:]), loss.unsqueeze(1)], dim=1)

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Any) -> dict[str, float]:
        _, scores = self.by_row(predictions, rows)
        return {name: float(scores[name].mean()) for name in names} | {
            "loss": float(predictions[:, 3].mean())
        }

    def truth(self, rows: Any) -> np.ndarray:
        truth: np.ndarray = rows.truth
        return truth

    def by_row(self, predictions: np.ndarray, rows: Any) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        spans = predictions[:, :2].astype(np.int64)
        texts = [context[start:end] for context, (start, end) in zip(rows.contexts, spans, strict=True)]
        return dict(zip(rows.ids, texts, strict=True)), compare(texts, rows.golds)

    def _shortened(self, questions: list[str]) -> list[str]:
        """The questions, cut where they would leave no room for a window to move on."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = min(LONGEST_QUESTION, (self.max_length - special - self.stride) // 2)
        if longest < 1:
            raise ArgumentError(
                f"max_length={self.max_length!r} is not allowed with stride={self.stride}; it must be >= "
                f"{self.stride + special + 2}, so that every window moves on"
            )
        encoded = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
        return [
            question[: offsets[longest - 1][1]] if len(offsets) > longest else question
            for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
        ]

    def _cls(self, ids: np.ndarray) -> int:
        """The position of [CLS], or the first one where a tokenizer has none."""
        cls = self.tokenizer.cls_token_id
        return 0 if cls is None else int(np.argmax(ids == cls))


def best_spans(start: Tensor, end: Tensor, bounds: Tensor, longest: int = LONGEST_ANSWER) -> Tensor:
    """First token, last token and score of the best span in each row: float32 [rows, 3].

    `start` and `end` are logits [rows, tokens]; `bounds` [rows, 2] say where a span may lie (the end is exclusive). A
    span has one to `longest` tokens and the score start + end; of equal scores the shortest span wins, then the first.
    A row without room has the score -inf.
    """
    tokens = torch.arange(start.shape[1], device=start.device)
    outside = (tokens < bounds[:, :1]) | (tokens >= bounds[:, 1:])
    start, end = start.float().masked_fill(outside, -torch.inf), end.float().masked_fill(outside, -torch.inf)
    best = start.new_full((len(start),), -torch.inf)
    first = last = torch.zeros_like(best, dtype=torch.long)
    for more in range(min(longest, start.shape[1])):
        score, token = (start[:, : start.shape[1] - more] + end[:, more:]).max(dim=1)
        better = score > best
        best = torch.where(better, score, best)
        first, last = torch.where(better, token, first), torch.where(better, token + more, last)
    return torch.stack([first.float(), last.float(), best], dim=1)


def _best_windows(questions: Questions, outputs: np.ndarray) -> np.ndarray:
    """Predictions [questions, 4] from the best span, its score and the loss of each window [windows, 4]."""
    predictions = np.zeros((len(questions.ids), 4))
    predictions[:, 2] = -np.inf
    counts = np.bincount(questions.owner, minlength=len(predictions))
    predictions[:, 3] = np.bincount(questions.owner, outputs[:, 3], len(predictions)) / counts
    for window, (first, last, score, _) in enumerate(outputs):
        question, begin = questions.owner[window], questions.labels[window, 2]
        if score > predictions[question, 2]:
            offsets = questions.offsets[window]
            predictions[question, :3] = offsets[int(first) - begin, 0], offsets[int(last) - begin, 1], score
    return predictions


def _context(sequences: list[int | None]) -> tuple[int, int]:
    """Begin and end (exclusive) of the context among the tokens of a window."""
    inside = [token for token, sequence in enumerate(sequences) if sequence == 1]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _locate(offsets: np.ndarray, context: str, start: int, stop: int) -> tuple[int, int] | None:
    """The context tokens of a window that hold the characters `start` to `stop`, or None where one is missing."""
    answer = context[start:stop]
    start, stop = start + len(answer) - len(answer.lstrip()), stop - len(answer) + len(answer.rstrip())
    if start >= stop or not len(offsets) or offsets[0, 0] > start or offsets[-1, 1] < stop:
        return None
    first = int(
        np.searchsorted(offsets[:, 1], start, side="right")
    )  # the first token that ends after `start`
    last = (
        int(np.searchsorted(offsets[:, 0], stop, side="left")) - 1
    )  # the last token that starts before `stop`
    return (first, last) if first <= last else None
