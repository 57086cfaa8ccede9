"""How alike are the vectors that different tasks learned, and how alike could they be?

W starts at 1, so the cosine of two raw W is near 1 whatever was learned. W − 1 and b are compared instead, between a
floor (permuted coordinates) and a ceiling (the same task with another seed).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from scipy.stats import t as student

from hadamard_toolkit.adapters.hadamard import IDENTITY
from hadamard_toolkit.errors import ArgumentError, check_choice, check_range
from hadamard_toolkit.studies.statistics import t_interval

MEASURES = ("cosine", "spearman")
NULL_DIRECTIONS = ("ones", None)
ALL_LAYERS = -1  # in a column `layer`: the mean over all layers
CELL = ["layer", "vector", "measure", "removed"]
PAIR_COLUMNS = ["task_a", "task_b", "seed_a", "seed_b", "key_a", "key_b", *CELL, "value"]
FLOOR_COLUMNS = ["floor", "floor_high", "random_sd"]


def share_text(first: str, second: str) -> bool:
    """Whether two tasks share texts: 732 of the 872 SST-2 test sentences are texts of `embedded/movies-*`."""
    return any(a == "sst2" and b.startswith("embedded/movies") for a, b in ((first, second), (second, first)))


def vector_similarity(
    vectors: pd.DataFrame,
    *,
    outliers: int = 4,
    permutations: int = 199,
    null_direction: str | None = "ones",
    seed: int = 0,
) -> pd.DataFrame:
    """Cosine and Spearman's ρ of W − 1 and of b between every two runs, layer by layer, with the floor of each.

    `vectors` is `vector_table` (key, task, seed, layer, vector, coordinate, value). One row per pair of runs, layer
    (and `ALL_LAYERS`, the mean over layers, where both runs have all), vector, measure and `removed`: 0 for all
    coordinates, and `outliers` without the largest ones over all runs (by mean square, each run scaled to length 1), as
    a few outlier dimensions of BERT-like models can make any two vectors alike (Kovaleva et al. 2021).

    Columns: task_a, task_b, seed_a, seed_b, key_a, key_b, layer, vector, measure, removed, value; `floor` and
    `floor_high`, mean and 95 % quantile of the value when the coordinates of each run are permuted, which keeps the
    values of the vectors but not their positions; and `random_sd` = 1/√d, the standard deviation for random directions.
    Tasks that share texts (`share_text`) are not paired.

    `null_direction="ones"`: b is taken without its mean. Behind W_O (placement "attention_output") b enters the
    residual sum and then a LayerNorm, which subtracts the mean over coordinates: b + c·1 is the same model for every c,
    in post-norm models (BERT) and, if only LayerNorms read the residual stream, in pre-norm models. This does not hold
    for an RMSNorm, nor before W_O (placement "attention_heads"): use None there. W has no such direction, as it
    multiplies values that differ from input to input. Ranks do not change with the mean, so ρ is the same either way.
    """
    check_choice("null_direction", null_direction, NULL_DIRECTIONS)
    check_range("outliers", outliers, least=0)
    check_range("permutations", permutations, least=19)
    if unknown := set(vectors["vector"]) - set(IDENTITY):
        raise ArgumentError(f"vectors['vector'] holds {sorted(unknown)}; allowed are {sorted(IDENTITY)}")
    if vectors["key"].nunique() < 2:
        raise ArgumentError("vectors holds fewer than two runs; there is nothing to compare")
    generator = np.random.default_rng(seed)
    parts = []
    for vector, of_vector in vectors.groupby("vector", sort=False):
        runs = of_vector.drop_duplicates("key")[["key", "task", "seed"]]
        runs = runs.sort_values(["task", "seed", "key"], ignore_index=True)
        moved = of_vector.assign(value=of_vector["value"] - IDENTITY[str(vector)])
        table = moved.pivot_table(index="key", columns=["layer", "coordinate"], values="value")
        table = table.reindex(runs["key"])
        for removed, measure in itertools.product(sorted({0, outliers}), MEASURES):
            project = vector == "bias" and null_direction == "ones"
            by_layer = {}
            for layer in sorted({int(place[0]) for place in table.columns}):
                values = _prepared(table[layer].to_numpy(float), removed, measure, project)
                drawn = generator.permuted(np.broadcast_to(values, (permutations, *values.shape)), axis=-1)
                by_layer[layer] = values @ values.T, drawn @ drawn.transpose(0, 2, 1), values.shape[1]
            stacked = [np.stack(part) for part in zip(*by_layer.values(), strict=True)]
            by_layer[ALL_LAYERS] = (stacked[0].mean(0), stacked[1].mean(0), int(stacked[2].sum()))
            for layer, (value, drawn, width) in by_layer.items():
                found = _pairs(runs, value, drawn).assign(random_sd=1 / math.sqrt(width))
                cell = {"layer": layer, "vector": vector, "measure": measure, "removed": removed}
                parts.append(found.assign(**cell))
    table = pd.concat(parts, ignore_index=True).dropna(subset="value")
    order = ["vector", "measure", "removed", "layer", "task_a", "task_b", "seed_a", "seed_b"]
    return table.sort_values(order, ignore_index=True, kind="stable")[PAIR_COLUMNS + FLOOR_COLUMNS]


def _prepared(values: np.ndarray, removed: int, measure: str, project: bool) -> np.ndarray:
    """Rows [runs, coordinates] whose inner products are the measure. A run without this layer is NaN."""
    if project:
        values = values - values.mean(1, keepdims=True)
    if removed:
        with np.errstate(invalid="ignore", divide="ignore"):
            share = values**2 / (values**2).sum(1, keepdims=True)
        weight = np.nan_to_num(share).mean(0)
        values = values[:, np.sort(np.argsort(weight, kind="stable")[: values.shape[1] - removed])]
        if values.shape[1] < 3:
            raise ArgumentError(
                f"outliers={removed} is not allowed; it leaves {values.shape[1]} coordinates, and 3 are needed"
            )
    if measure == "spearman":
        values = rankdata(values, axis=1, nan_policy="propagate")
        values = values - values.mean(1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length > 0, length, np.nan)  # a vector that never moved has no direction


def _pairs(runs: pd.DataFrame, value: np.ndarray, drawn: np.ndarray) -> pd.DataFrame:
    first, second = np.triu_indices(len(runs), 1)
    tasks = runs["task"].to_numpy()
    apart = np.array(
        [not share_text(str(tasks[a]), str(tasks[b])) for a, b in zip(first, second, strict=True)]
    )
    first, second = first[apart], second[apart]
    sides = [
        runs.iloc[side].add_suffix(suffix).reset_index(drop=True)
        for side, suffix in ((first, "_a"), (second, "_b"))
    ]
    null = drawn[:, first, second]
    values = {"value": value[first, second], "floor": null.mean(0)}
    return pd.concat(sides, axis=1).assign(**values, floor_high=np.quantile(null, 0.95, axis=0))


def similarity_summary(pairs: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Per pair of tasks and cell: the mean over pairs of runs with *different* seeds, its ceiling and its floor.

    Runs of one seed share the first weights of the head, so only runs of different seeds are compared, between tasks
    and within one task, so that the ceiling is of the same kind.

    Columns: task_a, task_b (the same task: its reliability), layer, vector, measure, removed; `value`, `least` and
    `most` over `pairs` pairs of runs; `low` and `high`, a t interval; `floor`, `floor_high`; `ceiling` = √(r_a r_b)
    with the reliabilities r of the two tasks; `disattenuated` = value / ceiling (Spearman 1904), NaN where a
    reliability is not above its own `floor_high`, as pure noise cannot be corrected for.

    Generalises to: other seeds of the two tasks. Pairs that share a run are not independent, so the interval counts
    *seeds*: the standard error is sd/√n on n − 1 degrees of freedom with n seeds, and √(2(n + 1)/(n − 1)) times that
    within one task, where all pairs are of the same few runs (exact for noise that a run contributes to all of its
    pairs; NaN with fewer than two pairs).

    Simulated: `low` to `high` covers in 0.95 to 0.98 at 2, 3 and 5 seeds between tasks, in 0.95 within one.
    `pytest tests/studies/test_similarity.py -k simulated`.
    """
    check_range("level", level, above=0, below=1)
    other = pairs[pairs["seed_a"] != pairs["seed_b"]]
    if other.empty:
        raise ArgumentError("pairs holds no two runs of different seeds; ceilings and comparisons need them")
    grouped = other.groupby(["task_a", "task_b", *CELL], sort=False)
    table = grouped.agg(
        value=("value", "mean"),
        least=("value", "min"),
        most=("value", "max"),
        sd=("value", "std"),
        pairs=("value", "size"),
        floor=("floor", "mean"),
        floor_high=("floor_high", "mean"),
        seeds_a=("seed_a", "nunique"),
        seeds_b=("seed_b", "nunique"),
    ).reset_index()
    within = table["task_a"] == table["task_b"]
    # within one task the pair (0, 1) has one seed on each side, and two seeds in all
    seeds = table[["seeds_a", "seeds_b"]].min(axis=1) + within
    error = table["sd"] / np.sqrt(seeds)
    error = error.where(~within, error * np.sqrt(2 * (seeds + 1) / (seeds - 1)))
    reach = student.ppf((1 + level) / 2, (seeds - 1).clip(lower=1)) * error
    table = table.assign(
        low=(table["value"] - reach).clip(lower=-1), high=(table["value"] + reach).clip(upper=1)
    )
    repeated = table[within].set_index(["task_a", *CELL])
    reliability = repeated["value"].where(repeated["value"] > repeated["floor_high"])
    first, second = (
        reliability.reindex(pd.MultiIndex.from_frame(table[[task, *CELL]])).to_numpy()
        for task in ("task_a", "task_b")
    )
    table["ceiling"] = np.sqrt(first * second)
    table["disattenuated"] = table["value"] / table["ceiling"]
    return table.drop(columns=["sd", "seeds_a", "seeds_b"])


def similarity_contrast(summary: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Per cell, are different tasks less alike than one task is to itself?

    One row per cell and `quantity`: `"between"` (mean over pairs of different tasks), `"within"` (mean reliability),
    `"gap"` (within − between), `"floor"` and `"disattenuated"` (over the pairs where it is defined). Columns: value,
    low, high, tasks and pairs that count. As pairs share tasks, the interval is the jackknife's: with θ of n tasks and
    θ_t of all but t, Student's interval of the n pseudo-values nθ − (n − 1)θ_t (Tukey 1958; Arvesen 1969), about the
    value itself. Drawing tasks with replacement (the vertex bootstrap) is too narrow with so few.

    Generalises to: other tasks.

    Simulated: at 4 and at 8 tasks that share a common part to different degrees, the 95 % interval covers the mean over
    all tasks in 0.93 to 0.95 (degrees of Beta(2, 5): 0.92; very skewed: 0.84 and 0.81); the vertex bootstrap in 0.78
    and 0.87.
    `pytest tests/studies/test_similarity.py -k simulated`.
    """
    check_range("level", level, above=0, below=1)
    rows = []
    for cell, part in summary.groupby(CELL, sort=False):
        within = part["task_a"] == part["task_b"]
        parts = {
            "between": (part[~within], "value"),
            "within": (part[within], "value"),
            "floor": (part[~within], "floor"),
            "disattenuated": (part[~within], "disattenuated"),
        }
        means = {quantity: _left_out(pairs, column) for quantity, (pairs, column) in parts.items()}
        inside, outside = means["within"], means["between"]
        # leaving out a task without a pair changes nothing
        whole = inside.index.union(outside.index, sort=False)
        inside, outside = (side.reindex(whole, fill_value=side[""]) for side in (inside, outside))
        means["gap"] = inside - outside
        for quantity, values in means.items():
            value, without = values.iloc[0], values.iloc[1:].dropna()
            count = len(without)
            _, low, high = t_interval(count * value - (count - 1) * without.to_numpy(), level=level)
            reach = (high - low) / 2
            pairs, column = parts.get(quantity, parts["between"])
            named = dict(zip(CELL, cell, strict=True))
            named |= {"quantity": quantity, "value": value, "low": value - reach, "high": value + reach}
            rows.append({**named, "tasks": count, "pairs": int(pairs[column].notna().sum())})
    return pd.DataFrame(rows)


def _left_out(pairs: pd.DataFrame, column: str) -> pd.Series:
    """The mean of `column` over all pairs (index ""), and over the pairs without each of the tasks."""
    known = pairs.dropna(subset=column)
    first, second = known["task_a"].to_numpy(), known["task_b"].to_numpy()
    tasks = sorted({*first, *second})
    stays = np.array([np.ones(len(known), bool), *((first != task) & (second != task) for task in tasks)])
    count = stays.sum(axis=1)
    total = stays @ known[column].to_numpy(dtype=float)
    means = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return pd.Series(means, index=["", *tasks])


def similarity_matrix(
    summary: pd.DataFrame,
    *,
    vector: str,
    measure: str = "cosine",
    removed: int = 0,
    layer: int = ALL_LAYERS,
    value: str = "value",
) -> pd.DataFrame:
    """One cell of `similarity_summary` as a symmetric table, tasks × tasks; the diagonal is each task with itself."""
    wanted = {"vector": vector, "measure": measure, "removed": removed, "layer": layer}
    part = summary
    for column, choice in wanted.items():
        check_choice(column, choice, sorted(set(summary[column])))
        part = part[part[column] == choice]
    mirrored = part.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    both = pd.concat([part, mirrored[mirrored["task_a"] != mirrored["task_b"]]])
    return both.pivot(index="task_a", columns="task_b", values=value).rename_axis(index=None, columns=None)
