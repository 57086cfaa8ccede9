"""How long a flip takes on MiniLM: preview and score on 256 rows, straight after opening, and with a look ahead.

`python -m pytest -m benchmark tests/benchmarks/test_pruner_speed.py -s` prints medians and spread. "As opened": with
the hidden states that opening leaves, and nothing else. Each layer and each site is flipped alone, then layers in twos,
then any subset is asked for; last through the widget, from the event to the number in the view.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.parts import LayerSite
from hadamard_toolkit.widgets.evaluation import PREVIEW, ROWS, Evaluation
from hadamard_toolkit.widgets.pruner import LayerPruner
from hadamard_toolkit.widgets.pruning_state import Reset, Toggle
from tests.adapters.life import shake

pytestmark = pytest.mark.benchmark

REPEATS = 3
LAYERS = range(6)
PREVIEW_LIMIT, SCORE_LIMIT = 0.2, 1.0  # seconds, on two cores


def seconds(work: Callable[..., object], *given: object) -> float:
    begun = time.perf_counter()
    work(*given)
    return time.perf_counter() - begun


def done(steps: Iterator[None]) -> None:
    deque(steps, maxlen=0)


def told(name: str, times: list[float]) -> str:
    ordered = sorted(times)
    spread = f"{ordered[0]:.3f} to {ordered[-1]:.3f}, n = {len(times)}"
    return f"{name:<42} median {statistics.median(times):.3f} s, {spread}"


@contextmanager
def as_opened(evaluation: Evaluation) -> Iterator[None]:
    """Afterwards the evaluation knows what it knew before."""
    cache = evaluation._cache
    held = [(known, dict(known)) for known in (evaluation._logits, evaluation._scores, cache._states)]
    prepared = dict(cache._prepared)
    yield
    for known, before in held:
        known.clear()
        known.update(before)  # type: ignore[arg-type]
    cache._prepared = prepared
    cache._begun.clear()


def flipped(evaluation: Evaluation, kept: frozenset[LayerSite]) -> tuple[float, float]:
    """Seconds of the preview, and from the beginning to the score."""
    with as_opened(evaluation):
        preview = seconds(evaluation.preview, kept)
        return preview, preview + seconds(evaluation.score, kept)


async def through_the_widget(pruner: LayerPruner, layer: int) -> tuple[float, float]:
    """Seconds until the view shows a preview, and until it shows the score."""
    begun = time.perf_counter()
    pruner.apply(Toggle(layer))
    preview = time.perf_counter() - begun
    while "up to date" not in pruner.panel._numbers.value:
        await asyncio.sleep(0)
    return preview, time.perf_counter() - begun


async def session(pruner: LayerPruner) -> list[tuple[float, float]]:
    found = []
    for layer in LAYERS:
        with as_opened(pruner.evaluations[0]):
            found.append(await through_the_widget(pruner, layer))
            pruner.apply(Reset())
            pruner._idle.stop()
    return found


def test_a_flip_on_minilm() -> None:
    model, tokenizer = ht.load_backbone("minilm-l6")
    attachment = ht.attach(model.eval(), ht.Hadamard())
    shake(attachment, scale=0.05)
    task = ht.load_task("embedded/movies-polarity")
    opening: dict[str, list[float]] = {"first pass": [], "preparing": []}
    times: dict[str, list[tuple[float, float]]] = {}
    subsets = [set(random.Random(seed).sample(LAYERS, seed % 6)) for seed in range(12)]
    ahead, second = [], []
    for _ in range(REPEATS):
        evaluation = Evaluation(attachment, task, tokenizer, split="test")
        assert len(evaluation.labels) == ROWS
        everything = frozenset(evaluation.places)
        opening["first pass"].append(seconds(evaluation.score, everything))
        opening["preparing"].append(seconds(done, evaluation.prepare(everything)))
        for layer in LAYERS:
            whole = {place for place in everything if place[0] == layer}
            times.setdefault(f"layer {layer}", []).append(flipped(evaluation, everything - whole))
        for place in evaluation.places:
            name = "one site of any layer"
            times.setdefault(name, []).append(flipped(evaluation, everything - {place}))
        for pair in combinations(LAYERS, 2):
            off = {place for place in everything if place[0] in pair}
            times.setdefault("any two layers", []).append(flipped(evaluation, everything - off))
        for subset in subsets:
            kept = frozenset(place for place in everything if place[0] in subset)
            times.setdefault("any subset", []).append(flipped(evaluation, kept))
        ahead.append(seconds(done, evaluation.flips(everything)))
        for first, other in combinations(LAYERS, 2):
            off = {place for place in everything if place[0] in (first, other)}
            second.append(flipped(evaluation, everything - off))
    pruner = LayerPruner(attachment, task, tokenizer=tokenizer, split="test")
    widget = [one for _ in range(REPEATS) for one in asyncio.run(session(pruner))]
    pruner.close()

    load = f"load {os.getloadavg()[0]:.1f}"
    tokens = sum(int(batch["attention_mask"].sum()) for batch in evaluation._cache._batches)
    print(
        f"\nMiniLM, {ROWS} film reviews of {tokens / ROWS:.0f} tokens, {torch.get_num_threads()} threads, {load}"
    )
    for name, found in opening.items():
        print(told(f"opening: {name}", found))
    singles = [one for name, found in times.items() if name.startswith("layer") for one in found]
    print(f"as opened\n{told(f'preview, {PREVIEW} rows, one layer', [quick for quick, _ in singles])}")
    print(told(f"score, {ROWS} rows, one layer", [whole for _, whole in singles]))
    for name, found in times.items():
        print(told(f"  {name}", [whole for _, whole in found]))
    print(told("look ahead: all scores one layer away", ahead))
    print(told("thereafter two layers, score", [whole for _, whole in second]))
    print(told("in the widget, as opened: preview shown", [quick for quick, _ in widget]))
    print(told("in the widget, as opened: score shown", [whole for _, whole in widget]))
    for name, found in {**times, "widget": widget}.items():
        assert statistics.median(quick for quick, _ in found) <= PREVIEW_LIMIT, name
        assert statistics.median(whole for _, whole in found) <= SCORE_LIMIT, name
