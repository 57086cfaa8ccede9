"""Equal budgets: which widths and sparsities keep the same number of weights (Large-Sparse, He et al. 2022)."""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.backbones import backbone_from_config
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_whole
from hadamard_toolkit.sparsity.maskable import targets
from hadamard_toolkit.sparsity.spec import Maskable

SIZES = ("bottleneck", "rank")  # fields that set the inner width of a part
MULTIPLES = (1, 2, 4, 8)  # times the smallest width, if `sizes` are left out


def large_sparse(
    budget: int,
    adapter: Adapter,
    model: PreTrainedModel | PreTrainedConfig,
    *,
    sizes: Iterable[int] | None = None,
    biases: bool = False,
    maskable: Maskable = "projections",
) -> pd.DataFrame:
    """Adapters of growing width with the sparsity at which each keeps `budget` parameters, to one entry.

    Parameters
    ----------
    budget: parameters that are kept: the maskable ones, or with `biases` all of the adapter, its dense biases (which
        grow with the width) and gates included.
    adapter: an adapter with a `bottleneck` or `rank`. Where parts of it have several, they keep their proportion, and
        `size` is the first one.
    model: a model or its config; only shapes count.
    sizes: widths; those that are too small for the budget are left out. None: the smallest power of two that holds the
        budget, and its doubles up to 8 times that.

    Returns one row per width: `size`, `adapter`, `maskable` (entries), `other` (parameters never masked), `kept` (of
    the maskable), `sparsity` (for `sparsify`, share removed), `total` (kept + other). Raises `ArgumentError` for a
    budget that no width meets, `UnsupportedError` for an adapter without a width.
    """
    check_whole("budget", budget, least=1)
    measure = _Measure(model, adapter, maskable)
    rows = []
    for size in _doubling(budget, measure, biases) if sizes is None else sizes:
        check_whole("sizes", size, least=1)
        entries, other = measure(size)
        kept = budget - other if biases else budget
        if 0 < kept <= entries:
            sparsity = (entries - kept) / entries
            assert round(sparsity * entries) == entries - kept
            rows.append((size, measure.of(size), entries, other, kept, sparsity, kept + other))
    if not rows:
        counted = "with biases" if biases else "without biases"
        raise ArgumentError(
            f"budget={budget} {counted} is not allowed: none of the sizes tried holds so many maskable parameters of "
            f"{adapter}, or its biases alone exceed it; give other sizes"
        )
    columns = ["size", "adapter", "maskable", "other", "kept", "sparsity", "total"]
    return pd.DataFrame(rows, columns=columns)


def _doubling(budget: int, measure: _Measure, biases: bool) -> list[int]:
    """The smallest power of two that holds the budget, and its doubles."""
    size = 1
    while sum(measure(size)[: 1 + biases]) < budget:
        size *= 2
    return [size * factor for factor in MULTIPLES]


def dense_adapter(
    adapter: Adapter,
    model: PreTrainedModel | PreTrainedConfig,
    kept: int,
    *,
    maskable: Maskable = "projections",
) -> Adapter:
    """`adapter` at the width at which it has nearest to `kept` maskable parameters (at least width 1)."""
    measure = _Measure(model, adapter, maskable)

    def entries(size: int) -> int:
        return measure(size)[0]

    below = max(1, bisect_right(range(1, measure.size + 1), kept, key=entries))
    return measure.of(min((below, below + 1), key=lambda size: abs(entries(size) - kept)))


Path = tuple[str | int, ...]  # names and indices that lead to a field, also of an adapter within an adapter


class _Measure:
    """Counts maskable and other parameters of an adapter at a width, on the meta device."""

    def __init__(
        self, model: PreTrainedModel | PreTrainedConfig, adapter: Adapter, maskable: Maskable
    ) -> None:
        config = copy.deepcopy(model.config if isinstance(model, PreTrainedModel) else model)
        with torch.device("meta"):
            self.model = backbone_from_config(config)
        self.adapter, self.maskable = adapter, maskable
        self.known: dict[int, tuple[int, int]] = {}
        # Prefixes and fusions have a `bottleneck` too, on which the number of maskable entries does not depend.
        entries, _ = self._count(adapter)
        self.widths = {
            path: size
            for path, size in _widths(adapter)
            if self._count(_replaced(adapter, path, 2 * size))[0] != entries
        }
        if not self.widths:
            raise UnsupportedError(f"{adapter} has no {' or '.join(SIZES)} that sets its number of weights")
        self.size = next(iter(self.widths.values()))

    def of(self, size: int) -> Adapter:
        """The adapter with this width; further parts of another width change in proportion."""
        adapter = self.adapter
        for path, width in self.widths.items():
            adapter = _replaced(adapter, path, max(1, round(width * size / self.size)))
        return adapter

    def __call__(self, size: int) -> tuple[int, int]:
        """Maskable and other stored parameters at this width, without the head."""
        if size not in self.known:
            self.known[size] = self._count(self.of(size))
        return self.known[size]

    def _count(self, adapter: Adapter) -> tuple[int, int]:
        attachment = attach(self.model, adapter)
        try:
            entries = sum(t.parameter.numel() for t in targets(attachment, self.maskable).values())
            return entries, int(attachment.count()["stored"].drop("head").sum()) - entries
        finally:
            attachment.detach()


def _widths(value: object) -> Iterator[tuple[Path, int]]:
    """Every width in an adapter, or a tuple of them, and in adapters within it, by path."""
    inner: dict[str | int, object] = {}
    if isinstance(value, Adapter):
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple):
        inner = dict(enumerate(value))
    for name, item in inner.items():
        if name in SIZES and isinstance(item, int):
            yield (name,), item
        else:
            yield from (((name, *path), size) for path, size in _widths(item))


def _replaced(value: Any, path: Path, size: int) -> Any:
    """An adapter, or a tuple of them, with another value at `path`."""
    if not path:
        return size
    first, *rest = path
    if isinstance(first, int):
        return (*value[:first], _replaced(value[first], tuple(rest), size), *value[first + 1 :])
    return replace(value, **{first: _replaced(getattr(value, first), tuple(rest), size)})
