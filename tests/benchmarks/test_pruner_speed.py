"""How long a flip takes on MiniLM: preview, score on 256 rows, and the same without the cache.

`python -m pytest -m benchmark tests/benchmarks/test_pruner_speed.py -s` prints medians and spread. Each layer is
switched off once from everything kept, with the hidden states that such a session has: those of the unpruned model;
then after a rest, in which the pruner looked ahead; then, straight after such a flip, each pair of layers.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import chain, combinations

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.widgets.evaluation import PREVIEW, ROWS, Evaluation
from tests.adapters.life import shake

pytestmark = pytest.mark.benchmark

REPEATS = 3
PREVIEW_LIMIT, SCORE_LIMIT = 0.2, 1.0  # seconds, median over layers, on two cores


def seconds(work: Callable[..., object], *given: object) -> float:
    begun = time.perf_counter()
    work(*given)
    return time.perf_counter() - begun


def cpu_share(work: Callable[..., object], *given: object) -> float:
    """Seconds that the work would take if its threads had their cores to themselves."""
    begun = time.process_time()
    work(*given)
    return (time.process_time() - begun) / torch.get_num_threads()


def two_flips(evaluation: Evaluation, everything: set[int], pair: tuple[int, int]) -> tuple[float, float]:
    """Seconds of the preview and the score with both layers of `pair` off, one of them being off already."""
    kept = everything - set(pair)
    return seconds(evaluation.preview, kept), seconds(evaluation.score, kept)


def told(name: str, times: list[float]) -> str:
    ordered = sorted(times)
    spread = f"{ordered[0]:.3f} to {ordered[-1]:.3f}, n = {len(times)}"
    return f"{name:<38} median {statistics.median(times):.3f} s, {spread}"


def test_a_flip_on_minilm() -> None:
    model, tokenizer = ht.load_backbone("minilm-l6")
    attachment = ht.attach(model.eval(), ht.Hadamard())
    shake(attachment, scale=0.05)
    task = ht.load_task("embedded/movies-polarity")
    everything = set(range(6))
    previews: dict[int, list[float]] = {layer: [] for layer in everything}
    scores: dict[int, list[float]] = {layer: [] for layer in everything}
    whole, without_cache, cpu = [], [], []
    for _ in range(REPEATS):
        evaluation = Evaluation(attachment, task, tokenizer, split="test")
        assert len(evaluation.labels) == ROWS
        evaluation.preview(everything)
        whole.append(seconds(evaluation.score, everything))
        for layer in sorted(everything, reverse=True):
            kept = everything - {layer}
            previews[layer].append(seconds(evaluation.preview, kept))
            scores[layer].append(seconds(evaluation.score, kept))
        evaluation._cache.clear()
        evaluation._scores.clear(), evaluation._logits.clear()
        evaluation.score(everything)
        cpu += [
            cpu_share(evaluation.score, everything - {layer}) for layer in sorted(everything, reverse=True)
        ]
        evaluation._cache.clear()
        evaluation._cache.resumes = False
        without_cache.append(seconds(evaluation.score, {0, 1, 2, 4}))
    all_previews, all_scores = (list(chain(*times.values())) for times in (previews, scores))
    evaluation = Evaluation(attachment, task, tokenizer, split="test")
    evaluation.score(everything)
    rest = seconds(lambda: list(evaluation.flips(everything)))
    looked_up = [seconds(evaluation.score, everything - {layer}) for layer in sorted(everything)]
    second = {pair: two_flips(evaluation, everything, pair) for pair in combinations(sorted(everything), 2)}
    load = f"load {os.getloadavg()[0]:.1f}"
    tokens = sum(int(batch["attention_mask"].sum()) for batch in evaluation._cache._batches)
    print(
        f"\nMiniLM, {ROWS} film reviews of {tokens / ROWS:.0f} tokens, {torch.get_num_threads()} threads, {load}"
    )
    print(told(f"preview, {PREVIEW} rows, any layer", all_previews))
    print(told(f"score, {ROWS} rows, any layer", all_scores))
    for layer in sorted(everything):
        print(told(f"  layer {layer}", scores[layer]))
    print(told("score after a rest (computed ahead)", looked_up) + f"; such a rest is {rest:.1f} s")
    print(told("a second flip at once, preview", [preview for preview, _ in second.values()]))
    print(told("a second flip at once, score", [score for _, score in second.values()]))
    for layer in sorted(everything)[1:]:
        print(
            told(f"  layer {layer} and one below", [s for (_, top), (_, s) in second.items() if top == layer])
        )
    print(told("score, any layer, CPU time per thread", cpu))
    print(told("opening (all layers, first pass)", whole))
    print(told("a score without the cache", without_cache))
    assert statistics.median(all_previews) <= PREVIEW_LIMIT
    assert statistics.median(all_scores) <= SCORE_LIMIT
    assert max(looked_up) <= SCORE_LIMIT
    assert statistics.median(score for _, score in second.values()) <= SCORE_LIMIT
