"""The rows of a run: drawn, tokenised when they are first needed, and as cached features."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.tasks.base import is_test
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.features import feature_source, head_features, without_backbone
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.question_answering import Spans
from hadamard_toolkit.training.splits import draw
from hadamard_toolkit.training.stages import TrainingState
from hadamard_toolkit.training.task_types import Kind, Labelled

WHOLE_SPLIT = (
    0.25  # a run that uses this share of a split encodes all of it, so that other seeds can reuse it
)
Encoded = dict[tuple[str, bytes], Any]  # tokenised rows, by their split and their positions in it


def kind_of(task: Task, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Kind:
    """The strategy for the kind of `task`."""
    kind = Spans if task.kind == "span" else Labelled
    return kind(task.text_columns, tokenizer, protocol)


class Data:
    """The rows of a run as text for the whole model.

    `parts` are the drawn rows: "train", "validation" if any are held out, and the test splits. The *pool* of a split is
    what is tokenised of it: the rows that any part uses, or all of them. Runs of the same task with the same
    tokenizer and length can share what is `encoded`.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        seed: int,
        encoded: Encoded | None = None,
    ) -> None:
        self.task, self.kind = task, kind_of(task, tokenizer, protocol)
        self.parts = draw(task.splits, protocol, seed)
        self._encoded = {} if encoded is None else encoded
        self._used = {part.split: self._rows_used(part.split) for part in self.parts.values()}

    def _rows_used(self, split: str) -> np.ndarray:
        used = np.unique(np.concatenate([part.rows for part in self.parts.values() if part.split == split]))
        count = len(self.task.splits[split])
        return np.arange(count) if not is_test(split) and len(used) >= WHOLE_SPLIT * count else used

    def pool(self, split: str) -> tuple[np.ndarray, Any]:
        """The rows of the pool of `split`, by position and tokenised."""
        rows, used = self.task.splits[split], self._used[split]
        key = split, used.tobytes()
        if key not in self._encoded:
            self._encoded[key] = self.kind.encode(rows if len(used) == len(rows) else rows.select(used))
        return used, self._encoded[key]

    def positions(self, name: str) -> np.ndarray:
        """Where the rows of part `name` are in the pool of their split."""
        part = self.parts[name]
        return np.searchsorted(self._used[part.split], part.rows)

    def rows(self, name: str) -> Any:
        """The tokenised rows of part `name`."""
        return self.pool(self.parts[name].split)[1].select(self.positions(name))

    def source(self, name: str) -> Source:
        """Part `name` as batches."""
        return self.kind.source(self.rows(name))

    def running(self) -> AbstractContextManager[None]:
        """Inside the block the model reads batches of these rows, as it always does."""
        return nullcontext()


class Features:
    """The rows of a run as cached features for the head alone, inside `without_backbone`.

    Those of the training and validation rows are computed at once; this raises `UnsupportedError` where the head cannot
    train on features. Those of a test split are computed, outside of `without_backbone`, when they are asked for.
    """

    def __init__(self, state: TrainingState, data: Data, store: FeatureStore) -> None:
        if not state.kind.cacheable:
            raise UnsupportedError(
                f"a head for {data.task.kind} tasks reads every token, so it cannot train on cached features"
            )
        self.state, self.data, self.store, self.parts = state, data, store, data.parts
        self._pools: dict[str, tuple[Tensor, np.ndarray]] = {}
        for name in ("train", "validation"):
            if name in self.parts:
                self.pool(self.parts[name].split)

    def pool(self, split: str) -> tuple[Tensor, np.ndarray]:
        """Features and labels of the pool of `split`."""
        if split not in self._pools:
            state, (_, examples) = self.state, self.data.pool(split)
            with state.timed("features"):
                vectors = head_features(
                    state.attachment,
                    examples,
                    state.kind.collate,
                    state.accelerator,
                    state.protocol.eval_batch_size,
                    self.store,
                )
            self._pools[split] = vectors, examples.labels
        return self._pools[split]

    def source(self, name: str) -> Source:
        """Part `name` as batches."""
        vectors, labels = self.pool(self.parts[name].split)
        positions = self.data.positions(name)
        return feature_source(self.state.attachment.model, vectors[positions], labels[positions])

    def running(self) -> AbstractContextManager[None]:
        """Inside the block the model is its head alone, which reads batches of these rows."""
        return without_backbone(self.state.attachment.model)


def check_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Raise `DataError` unless every row has the same number of end tokens, one or more.

    Only the heads of encoder-decoder models need that: they read the last one, and look for it in all rows at once.
    """
    end = getattr(model.config, "eos_token_id", None)
    if not model.config.is_encoder_decoder or data.task.kind == "span" or end is None:
        return
    usual, token, head = None, tokenizer.convert_ids_to_tokens(end), f"the head of {type(model).__name__}"
    for split in dict.fromkeys(part.split for part in data.parts.values()):
        rows, examples = data.pool(split)
        counts = [ids.count(end) for ids in examples.inputs["input_ids"]]
        usual = min(counts) if usual is None else usual
        for row, count in zip(rows.tolist(), counts, strict=True):
            where = f"task {data.task.name!r}, split {split!r}, row {row} has"
            if not count:
                raise DataError(
                    f"{where} no end token {token!r}, which {head} reads: the tokenizer should put one after every row"
                )
            if count != usual:
                raise DataError(
                    f"{where} {count} end tokens {token!r} where others have {usual}, and {head} needs as many in "
                    "every row: take it out of the text"
                )
