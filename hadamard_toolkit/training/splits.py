"""Which rows train, select and test."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import DatasetDict

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.tasks.base import is_test
from hadamard_toolkit.training.protocol import Protocol

LARGEST_DEFAULT = 1000  # validation rows held out where the protocol does not say how many
TEST_ROWS_SEED = 0  # a capped test set is the same for every run, so that runs can be compared row by row


@dataclass(frozen=True)
class SplitRows:
    """Some rows of one split of a task: their positions, ascending, and the number of rows `of` the split."""

    split: str
    rows: np.ndarray
    of: int

    def record(self) -> dict[str, Any]:
        """Split, number of rows, how many the split has, and the SHA-256 of their positions (little-endian int64)."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return {"split": self.split, "rows": len(self.rows), "of": self.of, "sha256": digest}


def draw(splits: DatasetDict, protocol: Protocol, seed: int) -> dict[str, SplitRows]:
    """The rows of the parts "train", "validation" (absent with `validation_rows=0`), "test" and further test splits.

    Training and validation rows are disjoint and drawn with `seed`. For one seed, the validation rows do not
    depend on K, and a smaller K gives a subset of a larger one. Raises `ArgumentError` for more rows than there are.
    """
    available = len(splits["train"])
    order = np.random.default_rng([seed, 0]).permutation(available)
    held_out = protocol.validation_rows
    if "validation" in splits:
        held_out = 0
    elif held_out is None:
        held_out = min(LARGEST_DEFAULT, math.ceil(available / 10))
    wanted = protocol.train_rows or available - held_out
    if held_out + wanted > available or wanted < 1:
        raise ArgumentError(
            f"train_rows={protocol.train_rows!r} and validation_rows={protocol.validation_rows!r} ask for "
            f"{max(wanted, 1)} + {held_out} rows, but the training split has {available}; ask for fewer"
        )

    def some_of(split: str, seed: int | list[int], count: int | None) -> SplitRows:
        order = np.random.default_rng(seed).permutation(len(splits[split]))
        return SplitRows(split, np.sort(order[:count]), len(order))

    parts = {"train": SplitRows("train", np.sort(order[held_out : held_out + wanted]), available)}
    if held_out:
        parts["validation"] = SplitRows("train", np.sort(order[:held_out]), available)
    elif "validation" in splits and protocol.validation_rows != 0:
        parts["validation"] = some_of("validation", [seed, 1], protocol.validation_rows)
    tests = {name: some_of(name, TEST_ROWS_SEED, protocol.test_rows) for name in splits if is_test(name)}
    return parts | tests
