"""Synthetic studies whose truth is known, and how often a test or an interval is right about them.

Every function takes the number of replicates: few in the tests here, many in `tests/benchmarks/test_simulations.py`,
whose rates the docstrings of the studies and docs/statistics.md quote.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from hadamard_toolkit.studies.statistics import hierarchical_bootstrap, mean_over

EFFECTS: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda generator, size: generator.normal(0, 1, size),
    "skewed": lambda generator, size: generator.exponential(1, size) - 1,
}


def task_table(
    generator: np.random.Generator, tasks: int, seeds: int, effects: str = "normal"
) -> pd.DataFrame:
    """Differences of two methods by task and seed, their mean over all tasks 0; tasks differ more than seeds do."""
    of_task = EFFECTS[effects](generator, tasks)
    place = pd.MultiIndex.from_product([range(tasks), range(seeds)], names=["task", "seed"])
    noise = generator.normal(0, 0.3, len(place))
    return pd.DataFrame({"score": np.repeat(of_task, seeds) + noise}, index=place).reset_index()


def coverage_of_mean_over(
    replicates: int, tasks: int, seeds: int = 2, *, effects: str = "normal", bootstrap: bool = False
) -> float:
    """How often the interval over tasks holds the truth; that of a percentile bootstrap over tasks for comparison."""
    generator = np.random.default_rng([tasks, seeds])
    covered = 0
    for _ in range(replicates):
        table = task_table(generator, tasks, seeds, effects)
        if bootstrap:
            means = table.groupby("task")["score"].mean().to_numpy()
            row = hierarchical_bootstrap([[mean] for mean in means], draws=1000).iloc[0]
        else:
            row = mean_over(table).iloc[0]
        covered += row["low"] <= 0 <= row["high"]
    return covered / replicates


def size_with_nested_rows(
    replicates: int, correlation: float, *, seeds: int = 3, pooled: bool = False
) -> float:
    """False positives where the rows of each K lie in those of the next: differences of one seed are correlated.

    `pooled` takes every pair of K and seed for a unit of its own; otherwise seeds are the units, all K of one averaged.
    """
    generator = np.random.default_rng([seeds, int(100 * correlation)])
    covariance = correlation + (1 - correlation) * np.eye(3)
    wrong = 0
    for _ in range(replicates):
        gains = generator.multivariate_normal(np.zeros(3), covariance, seeds)
        rows = [(seed, k, gains[seed, k]) for seed in range(seeds) for k in range(3)]
        table = pd.DataFrame(rows, columns=["seed", "rows", "score"])
        if pooled:
            table["seed"] = range(len(table))
        row = mean_over(table, over="seed").iloc[0]
        wrong += not row["low"] <= 0 <= row["high"]
    return wrong / replicates
