"""From text to batches: tokenise once, group rows of similar length, pad each batch to its longest row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from hadamard_toolkit.errors import DataError, check_range
from hadamard_toolkit.sparsity.batches import Batch


class Rows(Protocol):
    """What a `Source` needs of its rows: tokens, or cached features."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def lengths(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Sequence[int]) -> Any: ...


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens: `inputs[key][row]` are a row's integers under one input name, `labels[row]` is its target."""

    inputs: dict[str, list[Any]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by position, for a `DataLoader`; each carries its own position as `row`."""
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
        """Tokens per row."""
        return [len(ids) for ids in self.inputs["input_ids"]]


class Examples(TokenRows):
    """Rows of texts with one label each, an integer or a float."""

    def select(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """The rows at these positions, in this order."""
        order = np.asarray(rows, np.int64)
        return Examples(
            {key: [values[row] for row in order] for key, values in self.inputs.items()}, self.labels[order]
        )

    def digest(self) -> str:
        """SHA-256 of the token ids (and every other input key), row boundaries included; labels do not count."""
        digest = hashlib.sha256()
        for key in sorted(self.inputs):
            values = self.inputs[key]
            digest.update(f"{key}:{len(values)};".encode())
            digest.update(np.fromiter(map(len, values), np.int64, len(values)).tobytes())
            digest.update(b"".join(np.asarray(ids, np.int64).tobytes() for ids in values))
        return digest.hexdigest()


def tokenise(
    rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    """Tokenise the one or two text `columns` of `rows`, truncated to `max_length` tokens (the longer text first).

    Rows keep their order; what the tokenizer returns (ids, mask, token types) is kept, unpadded.
    """
    texts = [list(rows[column]) for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    labels = np.asarray(rows["label"])
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
    return Examples({key: list(values) for key, values in encoded.items()}, labels)


def mix(seed: int, part: int) -> int:
    """A seed below 2**31 for one part of what `seed` governs; unlike with a sum, no two pairs share their stream."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0]) >> 1


class LengthBucketedBatches(Sampler[list[int]]):
    """For training: batches of rows of similar length; every row once per epoch, in an order set by `(seed, epoch)`.

    Rows are permuted, grouped in blocks of up to 50 batches and sorted by length within a block; then the batches
    are shuffled. The one batch that may be short comes last, as `accelerate` expects when it shards batches.
    """

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0) -> None:
        check_range("batch_size", batch_size, least=1)
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; equal epochs give equal orders."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.lengths:
            return
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches, full = _chunks(order, self.batch_size), len(order) // self.batch_size
        yield from (batches[batch] for batch in torch.randperm(full, generator=generator).tolist())
        yield from batches[full:]


class SortedBatches(Sampler[list[int]]):
    """For evaluation: batches in order of falling length. Rows carry their position, by which they are put back."""

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        check_range("batch_size", batch_size, least=1)
        self.batch_size = batch_size  # accelerate reads it
        self.batches = _chunks(sorted(range(len(lengths)), key=lambda row: -lengths[row]), batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class Padding:
    """Collate token rows: pad to the longest row of the batch with the tokenizer's own rules, but on the right.

    Padding on the left would shift the positions of a row's tokens, so that the model's output for a row, and the
    token that its head reads, would depend on the other rows of the batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token, e.g. to eos_token"
            )
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        extra = {key: torch.as_tensor(np.asarray([row[key] for row in rows])) for key in ("row", "labels")}
        inputs = [{key: value for key, value in row.items() if key not in extra} for row in rows]
        return {**self.tokenizer.pad(inputs, return_tensors="pt", padding_side="right"), **extra}


@dataclass(frozen=True)
class Source:
    """Rows to train or evaluate on, and how a list of them becomes a batch."""

    rows: Rows
    collate: Callable[[Any], Batch]

    def training(self, batch_size: int, *, seed: int) -> DataLoader[Batch]:
        """Bucketed batches; the rows are in memory, so workers would only cost."""
        return self._loader(LengthBucketedBatches(self.rows.lengths, batch_size, seed=seed))

    def evaluation(self, batch_size: int) -> DataLoader[Batch]:
        """Batches of falling length."""
        return self._loader(SortedBatches(self.rows.lengths, batch_size))

    def _loader(self, batches: Sampler[list[int]]) -> DataLoader[Batch]:
        return DataLoader(self.rows, batch_sampler=batches, collate_fn=self.collate)  # type: ignore[arg-type]
