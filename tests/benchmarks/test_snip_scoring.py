"""What SNIP scoring costs: time against the same passes without scoring, peak memory against a training step.

`python -m pytest -m benchmark tests/benchmarks/test_snip_scoring.py -s` prints the numbers. Memory is counted tensor by
tensor on the CPU, where that of the process depends on the allocator's mood, and taken from the allocator on a GPU.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hadamard_toolkit as ht

pytestmark = pytest.mark.benchmark

EXAMPLES, BATCH, TOKENS, REPEATS = 320, 32, 64, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attached() -> ht.Attachment:
    model, _ = ht.load_backbone("minilm-l6")
    return ht.attach(model.to(DEVICE), ht.Houlsby(bottleneck=64, init="normal"))


def batches() -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (EXAMPLES, TOKENS), generator=noise)
    labels = torch.randint(0, 2, (EXAMPLES,), generator=noise)
    parts = zip(ids.split(BATCH), labels.split(BATCH), strict=True)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in parts]


def passes(attachment: ht.Attachment, data: list[dict[str, torch.Tensor]]) -> None:
    """The same forward and backward passes, gradients of everything that trains accumulating."""
    for batch in data:
        attachment.model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss.backward()
    attachment.model.zero_grad()


def scoring(attachment: ht.Attachment, data: list[dict[str, torch.Tensor]]) -> None:
    ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=data).remove()


def training(attachment: ht.Attachment, data: list[dict[str, torch.Tensor]]) -> None:
    """Training steps; from the second on, the optimizer's state is in place."""
    optimizer = torch.optim.AdamW([p for p in attachment.parameters() if p.requires_grad])
    attachment.model.eval()  # without dropout, as scoring is: its masks would be the larger part of the difference
    for batch in data:
        attachment.model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def seconds(work: Any, *given: Any) -> float:
    begun = time.perf_counter()
    work(*given)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def test_time_is_at_most_one_and_a_half_of_the_passes() -> None:
    attachment, data = attached(), batches()
    attachment.model.eval()
    for work in (passes, scoring):
        work(attachment, data[:2])
    pairs = [(seconds(passes, attachment, data), seconds(scoring, attachment, data)) for _ in range(REPEATS)]
    bare, scored = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    print(
        f"\n{EXAMPLES} examples of {TOKENS} tokens on {DEVICE}, median of {REPEATS}: passes {bare:.2f} s, SNIP "
        f"{scored:.2f} s, ratio {scored / bare:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    assert scored <= 1.5 * bare


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at one time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.before:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def peak_of(work: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """MiB beyond the loaded model."""
    attachment = attached()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(attachment, data)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Peak(attachment.model) as peak:
        work(attachment, data)
    return peak.most / 2**20


def test_peak_memory_is_at_most_that_of_a_training_step() -> None:
    data = batches()[:3]
    step, scored = peak_of(training, data), peak_of(scoring, data)
    print(f"\npeak beyond the model on {DEVICE}: training step {step:.1f} MiB, SNIP {scored:.1f} MiB")
    assert scored <= step
