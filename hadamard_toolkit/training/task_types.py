"""What the kind of a task changes about training: how rows become batches, outputs predictions, predictions scores.

The loop asks an object of this module and knows no kind itself. `Labelled` serves classification and regression,
`spans.Spans` answers that are spans of a text, `masked.MaskedText` masked-language modelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.training import evaluation
from hadamard_toolkit.training.batching import Batch, Padding, Rows, Source, tokenise
from hadamard_toolkit.training.protocol import Protocol as TrainingProtocol


class Kind(Protocol):
    """The strategy of one kind of task.

    Attribute: `cacheable`, whether the head can read one cached vector per row.
    """

    cacheable: bool

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Some encoded rows as one batch, with their `row` and `labels`."""
        ...

    def encode(self, rows: Dataset) -> Any:
        """Rows of a task, tokenised. `select(positions)` of the result gives some of them."""
        ...

    def source(self, rows: Any) -> Source:
        """Encoded rows as batches."""
        ...

    def targets(self, batch: Batch) -> Batch:
        """What `forward` needs beside its inputs to return a loss."""
        ...

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        """Predictions in row order, one line each, in evaluation mode."""
        ...

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """The metrics `names` and the mean `loss`."""
        ...

    def truth(self, rows: Any) -> np.ndarray:
        """The true answers, one line per row."""
        ...

    def by_row(self, predictions: np.ndarray, rows: Any) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        """Answers in words by the id of their row, and metrics row by row; both empty where logits say it all."""
        ...


class Labelled:
    """Classification and regression: predictions are logits [rows, outputs], the truth is the label."""

    cacheable = True

    def __init__(
        self, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, protocol: TrainingProtocol
    ) -> None:
        self.columns, self.tokenizer, self.max_length = columns, tokenizer, protocol.max_length
        self._pad = Padding(tokenizer)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        return self._pad(rows)

    def encode(self, rows: Dataset) -> Any:
        return tokenise(rows, self.columns, self.tokenizer, self.max_length)

    def source(self, rows: Any) -> Source:
        return Source(rows, self.collate)

    def targets(self, batch: Batch) -> Batch:
        return {"labels": batch["labels"]}

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        return evaluation.predict(accelerator, model, source, batch_size)

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        return evaluation.score(tuple(names), predictions, rows.labels)

    def truth(self, rows: Any) -> np.ndarray:
        labels: np.ndarray = rows.labels
        return labels

    def by_row(self, predictions: np.ndarray, rows: Any) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        return {}, {}
