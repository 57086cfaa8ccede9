"""Synthetic studies whose truth is known, and how often a test or an interval is right about them.

Every function takes the number of replicates: few in the tests here, many in `tests/benchmarks/test_simulations.py`,
whose rates the docstrings of the studies and docs/statistics.md quote.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd

from hadamard_toolkit.studies.ablation import component_effects
from hadamard_toolkit.studies.layer_ablation import removal_paths, write_kept
from hadamard_toolkit.studies.layer_ablation_tests import better_than_chance, rank_agreement
from hadamard_toolkit.studies.sharing import sharing_summary
from hadamard_toolkit.studies.statistics import hierarchical_bootstrap, mean_over
from hadamard_toolkit.studies.sufficient import smallest_set
from tests.studies.removals import subsets

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


def coverage_of_components(
    replicates: int, over: str, *, truth: str = "these", tasks: int = 3, seeds: int = 3
) -> float:
    """How often the interval of `component_effects` holds the effect on these tasks, or on others (`truth`)."""
    covered = 0
    for replicate in range(replicates):
        generator = np.random.default_rng([replicate, tasks, seeds])
        of_task = generator.normal(0, 0.01, tasks)
        gain = of_task[:, None] + generator.normal(0, 0.01, (tasks, seeds))
        rows = [
            (task, seed, cell, 0.8 + (cell != "norm") * gain[task, seed])
            for task in range(tasks)
            for seed in range(seeds)
            for cell in ("norm", "W + b + norm")
        ]
        table = pd.DataFrame(rows, columns=["task", "seed", "cell", "score"])
        row = component_effects(table, over=over).set_index("part").loc["W + b"]
        covered += bool(row["low"] <= (of_task.mean() if truth == "these" else 0.0) <= row["high"])
    return covered / replicates


def sharing_claims(replicates: int, kept: float) -> dict[str, float]:
    """`sharing_summary` with 8 tasks and 5 schemes that all keep `kept` of the reference's score: how often the
    interval holds it, how often a scheme passes for at least 98 % (`p` <= 0.05), and `any` of them after Holm."""
    claims = []
    for replicate in range(replicates):
        generator = np.random.default_rng([replicate, 3])
        base = generator.normal(0.75, 0.06, 8)
        schemes = {"own": base, "bare": base - 0.1}
        schemes |= {f"scheme {place}": kept * base + generator.normal(0, 0.01, 8) for place in range(5)}
        rows = [(t, 0, name, own[t], 1.0, 0.01) for name, own in schemes.items() for t in range(8)]
        table = pd.DataFrame(rows, columns=["task", "seed", "scheme", "score", "parameters", "percent"])
        found = sharing_summary(table).filter(like="scheme", axis="index")
        covered = (found["share_low"] <= kept) & (kept <= found["share_high"])
        claims.append((covered.mean(), (found["p"] <= 0.05).mean(), found["noninferior"].any()))
    return {
        name: float(rate)
        for name, rate in pd.DataFrame(claims, columns=["covered", "p", "any"]).mean().items()
    }


# layers ------------------------------------------------------------------------------------------------------------


@cache
def _grid_of_runs(tasks: int, seeds: int, layers: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Every subset of every run on both splits, and [rows, layers] of what is kept."""
    runs = [(f"{task}-{seed}", f"task {task}", seed) for task in range(tasks) for seed in range(seeds)]
    rows = [
        (*run, write_kept(kept), split)
        for run in runs
        for split in ("validation", "test")
        for kept in subsets(layers)
    ]
    there = np.array([[layer in kept for layer in range(layers)] for kept in subsets(layers)])
    return pd.DataFrame(rows, columns=["key", "task", "seed", "kept", "split"]), np.tile(
        there, (2 * len(runs), 1)
    )


def removal_table(
    generator: np.random.Generator,
    tasks: int = 9,
    seeds: int = 1,
    layers: int = 6,
    *,
    shared: float = 0.0,
) -> pd.DataFrame:
    """Scores of all subsets: noise, and an order of the layers that all tasks share, of which the better four score
    `shared` above the mean four."""
    table, kept = _grid_of_runs(tasks, seeds, layers)
    order = np.linspace(-1, 1, layers)
    order *= shared / order[-4:].sum()  # the mean subset scores nothing
    noise = np.where(table["split"] == "test", 0.01, 0.02) * generator.normal(0, 1, len(table))
    return table.assign(score=0.7 + kept @ order + noise)


def random_orders(generator: np.random.Generator, removals: pd.DataFrame, *, common: bool) -> pd.DataFrame:
    """Importances that know nothing of the scores: of each task by itself, or the same for all tasks."""
    runs = removals.drop_duplicates("key")
    layers = 1 + int(removals["kept"].str[-1:].replace("", "-1").astype(int).max())
    of_all = generator.permutation(layers)
    orders = {task: of_all if common else generator.permutation(layers) for task in runs["task"].unique()}
    rows = [(row.key, layer, orders[row.task][layer]) for row in runs.itertuples() for layer in range(layers)]
    return pd.DataFrame(rows, columns=["key", "layer", "value"])


def chance_claims(
    replicates: int, *, rule: str, shared: float = 0.0, common: bool = False
) -> dict[str, float]:
    """How often `better_than_chance` claims something for `rule`, in 9 tasks of 6 layers.

    `norm` is an order that knows nothing of the scores, so all its claims are false; `greedy` and `consensus` find
    what is planted. `size`: uncorrected claims over tasks, share of the sizes 2, 3 and 4. `tasks` and `relabelling`:
    at least one of these after Holm's correction over all rules and sizes of the question, as a study does.
    """
    claims = []
    for replicate in range(replicates):
        generator = np.random.default_rng([replicate, common])
        removals = removal_table(generator, shared=shared)
        paths = removal_paths(removals, random_orders(generator, removals, common=common))
        found = better_than_chance(removals, paths)
        found = found[(found["rule"] == rule) & found["size"].isin([2, 3, 4])]
        over = found["test"] == "tasks"
        claims.append(
            {
                "size": (found.loc[over, "p"] <= 0.05).mean(),
                "tasks": (found.loc[over, "p_holm"] <= 0.05).any(),
                "relabelling": (found.loc[~over, "p_holm"] <= 0.05).any(),
            }
        )
    return {name: float(rate) for name, rate in pd.DataFrame(claims).mean().items()}


def agreement_claims(replicates: int, rule: str, tasks: int = 9, shared: float = 0.0) -> float:
    """How often `rank_agreement` finds the orders of a rule in agreement at 5 %; 0 where it refuses."""
    claims = 0
    for replicate in range(replicates):
        removals = removal_table(np.random.default_rng([replicate, tasks]), tasks, shared=shared)
        found = rank_agreement(removal_paths(removals)).set_index("rule")
        claims += bool(found.loc[rule, "p"] <= 0.05)
    return claims / replicates


def within_margin_claims(
    replicates: int,
    *,
    rows: int,
    cost: float,
    free: int = 0,
    margin: float = 0.02,
    same_rows: bool = False,
) -> dict[str, float]:
    """How often `smallest_set` lets a layer of 5 go, and confirms it, where each step truly costs `cost`; 3 seeds.

    `free` layers cost nothing. Without a layer, 6 % of the rows change between right and wrong, and each subset has
    other ones: choosing by the score among such subsets is what a path profits from if it is judged by its own rows
    (`same_rows`: the greedy path under a name of which the study knows nothing).
    """
    layers, disagree = 5, 0.06
    table, kept = _grid_of_runs(1, 3, layers)
    lost = (~kept[:, free:]).sum(axis=1) * cost
    passed = confirmed = 0
    for replicate in range(replicates):
        generator = np.random.default_rng([replicate, rows, 7])
        right, n = [], np.where(table["split"] == "test", 400, rows)
        base = {run: generator.random(max(n)) < 0.8 for run in zip(table["key"], table["split"], strict=True)}
        for key, split, size, gone, text in zip(
            table["key"], table["split"], n, lost, table["kept"], strict=True
        ):
            own = base[key, split][:size]
            if (
                text.count(",") < layers - 1
            ):  # right to wrong, and back, so that the share right falls by `gone`
                change = generator.random(size)
                own = np.where(own, change > (disagree / 2 + gone) / 0.8, change < disagree / 2 / 0.2)
            right.append(own)
        packed = [np.packbits(own).tobytes().hex() for own in right]
        removals = table.assign(n=n, correct=packed, score=[own.mean() for own in right])
        paths = removal_paths(removals)
        if same_rows:
            paths = paths[paths["rule"] == "greedy"].assign(rule="seen")
        rule = "seen" if same_rows else "greedy"
        row = smallest_set(removals, paths, margin=margin, rule=rule, draws=400).iloc[0]
        passed += int(row["size"]) < layers
        confirmed += bool(row["confirmed"])
    return {"passed": passed / replicates, "confirmed": confirmed / replicates}
