"""What the kind of a task changes about training: how rows become batches, and outputs predictions and scores.

The loop talks to a `Kind` and never asks which one it is: `Labelled` for classification and regression,
`question_answering.Spans` for answers that are spans of a text, `masked_lm.MaskedText` for masked-language modelling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training import evaluation
from hadamard_toolkit.training.batching import Padding, Rows, Source, tokenise
from hadamard_toolkit.training.protocol import Protocol


class Kind(ABC):
    """The strategy of one kind of task. Predictions are one line per row, by default the logits.

    `cacheable` says whether the head can read one cached vector per row.
    """

    cacheable = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._pad = Padding(tokenizer)

    @abstractmethod
    def encode(self, rows: Dataset) -> Any:
        """Rows of a task, tokenised. `select(positions)` of the result gives some of them."""

    @abstractmethod
    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Any) -> dict[str, float]:
        """The metrics `names` and the mean `loss`."""

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Encoded rows as one batch, with their `row` and `labels`."""
        return self._pad(rows)

    def source(self, rows: Rows) -> Source:
        """Encoded rows as batches."""
        return Source(rows, self.collate)

    def targets(self, batch: Batch) -> Batch:
        """What `forward` needs beside its inputs to return a loss."""
        return {"labels": batch["labels"]}

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        """Predictions in row order, in evaluation mode: float32 [rows, width]."""
        outputs = partial(self._outputs, model)
        return evaluation.collect_in_evaluation(accelerator, model, source, batch_size, outputs)

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is collected of a batch: [rows of the batch, width]."""
        logits: Tensor = model(**evaluation.inputs_of(batch)).logits
        return logits

    def truth(self, rows: Any) -> np.ndarray:
        """The true answers, one line per row."""
        labels: np.ndarray = rows.labels
        return labels

    def by_row(self, predictions: np.ndarray, rows: Any) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        """Answers as text by the id of their row, and metrics row by row; both are empty unless answers are texts."""
        return {}, {}


class Labelled(Kind):
    """Classification and regression: predictions are logits [rows, outputs], the truth is the label."""

    cacheable = True

    def __init__(
        self, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, protocol: Protocol
    ) -> None:
        super().__init__(tokenizer, protocol.max_length)
        self.columns = columns

    def encode(self, rows: Dataset) -> Any:
        return tokenise(rows, self.columns, self.tokenizer, self.max_length)

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Any) -> dict[str, float]:
        return evaluation.score(tuple(names), predictions, rows.labels)
