"""The batches that scores are computed on, and the record of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hadamard_toolkit.errors import ArgumentError, DataError

Batch = dict[str, Tensor]  # model inputs and targets by name, each [rows, …]
TARGETS = ("labels", "start_positions")  # what a loss needs, and counts rows by


@dataclass(frozen=True, eq=False)
class Batches(Sequence[Batch]):
    """Model inputs with `labels`, in order; `origin` says where they come from (`data_seed` and anything else)."""

    items: tuple[Batch, ...]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, Tensor]] | None) -> Batches:
        """Checked batches from any iterable of dictionaries with `labels`; None gives none."""
        if isinstance(batches, Batches):
            return batches
        items = []
        for index, batch in enumerate(batches or ()):
            if not isinstance(batch, Mapping) or not any(name in batch for name in TARGETS):
                keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(
                    f"batches[{index}] is {keys}; each batch must be model inputs by name, with 'labels' (or "
                    "'start_positions' and 'end_positions')"
                )
            items.append({name: torch.as_tensor(value) for name, value in batch.items() if name != "row"})
            if not _rows(items[-1]):
                raise DataError(f"batches[{index}] is empty; each batch must hold at least one example")
        return cls(tuple(items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    @property
    def examples(self) -> int:
        """Rows of all batches together."""
        return sum(map(_rows, self.items))

    def on(self, device: torch.device) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Each batch on `device` with its share of all examples."""
        total = self.examples
        for batch in self.items:
            moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            yield moved, _rows(batch) / total

    def require(self, purpose: str) -> None:
        """Raise `ArgumentError` if there are none."""
        if not self.items:
            raise ArgumentError(
                f"batches=[] is not allowed: {purpose} needs at least one batch of model inputs with labels "
                "(draw_batches makes them from a task)"
            )

    def record(self) -> dict[str, Any]:
        """JSON-able: number of batches and examples, SHA-256 of their contents in order, and `origin`."""
        digest = hashlib.sha256()
        for batch in self.items:
            for name in sorted(batch):
                value = batch[name].cpu().contiguous()
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.numpy().tobytes())
        sha256 = digest.hexdigest() if self.items else None
        counts = {"batches": len(self), "examples": self.examples}
        return {"data_seed": None, **self.origin, **counts, "sha256": sha256}


def _rows(batch: Batch) -> int:
    return len(next(batch[name] for name in TARGETS if name in batch))
