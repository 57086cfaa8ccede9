"""Tables of scores with some layers kept, whose truth is planted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd

from hadamard_toolkit.studies.layer_ablation import read_kept, write_kept

LAYERS = 4
WORTH = np.array([0.01, 0.12, 0.02, 0.06])  # what each planted layer adds


def subsets(layers: int = LAYERS) -> list[tuple[int, ...]]:
    return [kept for size in range(layers + 1) for kept in itertools.combinations(range(layers), size)]


def table(
    score: Callable[..., float], *, tasks: int = 2, seeds: int = 2, layers: int = LAYERS
) -> pd.DataFrame:
    """`score(task, seed, split, kept)` of every subset."""
    rows = [
        (f"{task}-{seed}", f"task {task}", seed, write_kept(kept), split, score(task, seed, split, kept))
        for task in range(tasks)
        for seed in range(seeds)
        for split in ("validation", "test")
        for kept in subsets(layers)
    ]
    return pd.DataFrame(rows, columns=["key", "task", "seed", "kept", "split", "score"])


def planted(task: int, seed: int, split: str, kept: tuple[int, ...]) -> float:
    return float(0.6 + WORTH[list(kept)].sum() + seed / 1000)


def noise(start: int, *, tasks: int = 2, seeds: int = 2, layers: int = LAYERS) -> pd.DataFrame:
    generator = np.random.default_rng(start)
    return table(lambda *_: generator.normal(0.8, 0.02), tasks=tasks, seeds=seeds, layers=layers)


def by_rows(
    rates: Callable[..., float], *, rows: int = 200, tasks: int = 1, seeds: int = 3, start: int = 0
) -> pd.DataFrame:
    """Tables that tell which rows are right: a row with u < rate is, with the same u for every subset."""
    found = table(planted, tasks=tasks, seeds=seeds)
    generator = np.random.default_rng(start)
    place = {
        run: generator.random(rows)
        for run in itertools.product(found["key"].unique(), ("validation", "test"))
    }
    right = [
        place[key, split] < rates(read_kept(kept))
        for key, split, kept in zip(found["key"], found["split"], found["kept"], strict=True)
    ]
    packed = [np.packbits(own).tobytes().hex() for own in right]
    return found.assign(n=rows, correct=packed, score=[own.mean() for own in right])
