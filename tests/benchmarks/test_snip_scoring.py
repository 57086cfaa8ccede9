"""What SNIP scoring costs: time against the same passes without scoring, peak memory against a training step.

`python -m pytest -m benchmark tests/benchmarks/test_snip_scoring.py -s` prints the numbers. On the CPU the memory is that
of two processes of their own, on a GPU that of the allocator.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

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
    """Two steps, the second with the optimizer's state in place."""
    optimizer = torch.optim.AdamW([p for p in attachment.parameters() if p.requires_grad])
    attachment.model.eval()  # without dropout, as scoring is: its masks would be the larger part of the difference
    for batch in data[:2]:
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


def peak_of(name: str) -> float:
    """MiB that the work takes beyond loading and attaching, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.test_snip_scoring", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def test_peak_memory_is_at_most_that_of_a_training_step() -> None:
    step, scored = peak_of("training"), peak_of("scoring")
    print(f"\npeak beyond the loaded model on {DEVICE}: training step {step:.0f} MiB, SNIP {scored:.0f} MiB")
    assert scored <= step


def _measure(name: str) -> None:
    attachment, data = attached(), batches()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        globals()[name](attachment, data)
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 2**20))
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    globals()[name](attachment, data)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10))


if __name__ == "__main__":
    _measure(sys.argv[1])
