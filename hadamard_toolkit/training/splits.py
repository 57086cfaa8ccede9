"""Which rows train, select and test."""

from __future__ import annotations

import hashlib
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
class Part:
    """Rows of one split of a task, by position."""

    split: str
    rows: np.ndarray
    of: int

    def record(self) -> dict[str, Any]:
        """Split, number of rows, how many the split has, and the SHA-256 of their positions (little-endian int64)."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return {"split": self.split, "rows": len(self.rows), "of": self.of, "sha256": digest}


def draw(splits: DatasetDict, protocol: Protocol, seed: int) -> dict[str, Part]:
    """The parts "train", "validation" (absent with `validation_rows=0`), "test" and further test splits.

    Training and validation rows are disjoint and drawn with `seed`. For one seed, the validation rows do not
    depend on K, and a smaller K gives a subset of a larger one. Raises `ArgumentError` for more rows than there are.
    """
    available = len(splits["train"])
    order = np.random.default_rng([seed, 0]).permutation(available)
    own = "validation" in splits
    held_out = 0 if own else _held_out(protocol, available)
    wanted = protocol.train_rows or available - held_out
    if held_out + wanted > available or wanted < 1:
        raise ArgumentError(
            f"train_rows={protocol.train_rows!r} and validation_rows={protocol.validation_rows!r} ask for "
            f"{max(wanted, 1)} + {held_out} rows, but the training split has {available}; ask for fewer"
        )
    parts = {"train": Part("train", np.sort(order[held_out : held_out + wanted]), available)}
    if own and protocol.validation_rows != 0:
        count = len(splits["validation"])
        rows = np.random.default_rng([seed, 1]).permutation(count)[: protocol.validation_rows]
        parts["validation"] = Part("validation", np.sort(rows), count)
    elif held_out:
        parts["validation"] = Part("train", np.sort(order[:held_out]), available)
    for name in splits:
        if is_test(name):
            rows = np.random.default_rng(TEST_ROWS_SEED).permutation(len(splits[name]))[: protocol.test_rows]
            parts[name] = Part(name, np.sort(rows), len(splits[name]))
    return parts


def _held_out(protocol: Protocol, available: int) -> int:
    if protocol.validation_rows is None:
        return min(LARGEST_DEFAULT, -(-available // 10))
    return protocol.validation_rows
