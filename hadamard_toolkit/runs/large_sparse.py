"""The comparison that Large-Sparse is judged by: the same budget, dense and sparse, beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.tuning import FullFineTuning
from hadamard_toolkit.backbones import load_backbone
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.sparsity.budgets import dense_adapter, large_sparse
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.training.protocol import Protocol


def large_sparse_plan(
    budget: int,
    adapter: Adapter,
    *,
    task: str | Iterable[str],
    protocol: Protocol,
    sparsity: Sparsity,
    backbone: str = "minilm-l6",
    full_protocol: Protocol | None = None,
    sizes: Iterable[int] | None = None,
    biases: bool = False,
    seeds: Iterable[int] = (0,),
) -> list[RunSpec]:
    """Specs for `sweep`: per task and seed the small dense adapter, a sparse one per larger width, full fine-tuning.

    `budget`, `adapter`, `sizes` and `biases` as in `large_sparse`; of `sparsity` all is used but the share, which each
    width sets. `full_protocol` is that of full fine-tuning, whose learning rate is another one; None takes `protocol`.
    """
    model, _ = load_backbone(backbone)
    pairs = large_sparse(budget, adapter, model, sizes=sizes, biases=biases, maskable=sparsity.maskable)
    pairs = pairs[pairs["sparsity"] > 0]
    first = int(pairs["kept"].iloc[0]) if len(pairs) else budget
    rows: list[tuple[Adapter, Sparsity | None, Protocol]] = [
        (dense_adapter(adapter, model, first, maskable=sparsity.maskable), None, protocol)
    ]
    rows += [
        (wide, replace(sparsity, sparsity=share), protocol)
        for wide, share in zip(pairs["adapter"], pairs["sparsity"], strict=True)
    ]
    rows.append((FullFineTuning(), None, full_protocol or protocol))
    tasks = [task] if isinstance(task, str) else list(task)
    seeds = list(seeds)
    return [
        RunSpec(backbone, name, method, how, pruning, seed)
        for name in tasks
        for method, pruning, how in rows
        for seed in seeds
    ]
