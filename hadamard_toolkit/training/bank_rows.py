"""The rows of the runs of a bank, as padded tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.batching import Source, TokenRows
from hadamard_toolkit.training.data import Data
from hadamard_toolkit.training.evaluation import inputs_of


class Table:
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source], device: torch.device) -> None:
        self.device = device
        # Lengths that suit tensor cores and fused attention.
        self._multiple = 8 if device.type == "cuda" else 1
        batch = _one_batch(sources)
        self.labels = batch["labels"].to(device)
        self.inputs = {name: value.to(device) for name, value in inputs_of(batch).items()}
        self.lengths = np.concatenate([np.asarray(source.rows.lengths) for source in sources])

    def take(self, positions: np.ndarray) -> tuple[Batch, Tensor]:
        """Inputs [runs, rows, tokens, …] and labels [runs, rows] of the rows at `positions` [runs, rows]."""
        longest = -(-int(self.lengths[positions].max()) // self._multiple) * self._multiple
        index = torch.from_numpy(positions).to(self.device, non_blocking=True)
        return {name: value[:, :longest][index] for name, value in self.inputs.items()}, self.labels[index]


def _one_batch(sources: Sequence[Source]) -> Batch:
    groups = [source.rows.__getitems__(range(len(source.rows))) for source in sources]
    if all(isinstance(source.rows, TokenRows) for source in sources):
        return sources[0].collate([row for group in groups for row in group])  # padded to one length
    batches = [source.collate(group) for source, group in zip(sources, groups, strict=True)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@dataclass(frozen=True)
class PartRows:
    """One part ("train", "validation", …) of several runs: a table, and by run the positions of its rows in it."""

    table: Table
    positions: dict[int, np.ndarray]


class BankRows:
    """The rows of all runs as text, or as features, in tables that are made when they are needed.

    `as_source(index, split)` makes a source of what run `index` may use of a split; runs that share rows share it.
    """

    def __init__(
        self, data: Sequence[Data], device: torch.device, as_source: Callable[[int, str], Source]
    ) -> None:
        self.data, self.device, self._as_source = data, device, as_source
        self._sources: dict[int, Source] = {}
        self._tables: dict[tuple[int, ...], Table] = {}

    def part(self, name: str, runs: Sequence[int]) -> PartRows | None:
        """Part `name` of those of `runs` that have it, or None where none has."""
        pools = {}
        for index in runs:
            if name in self.data[index].parts:
                split = self.data[index].parts[name].split
                _, examples = self.data[index].pool(split)
                pools[index] = id(examples)
                if id(examples) not in self._sources:
                    self._sources[id(examples)] = self._as_source(index, split)
        if not pools:
            return None
        pool_ids = tuple(dict.fromkeys(pools.values()))
        sources = [self._sources[pool] for pool in pool_ids]
        if pool_ids not in self._tables:
            self._tables[pool_ids] = Table(sources, self.device)
        starts = np.cumsum([0, *(len(source.rows) for source in sources)])
        start_of = dict(zip(pool_ids, starts.tolist(), strict=False))
        positions = {
            index: start_of[pool] + self.data[index].positions(name) for index, pool in pools.items()
        }
        return PartRows(self._tables[pool_ids], positions)


def stacked(positions: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Positions of several runs as one array [runs, length]; where a run has fewer, its last one is repeated."""
    return np.stack([np.pad(one, (0, length - len(one)), mode="edge") for one in positions])
