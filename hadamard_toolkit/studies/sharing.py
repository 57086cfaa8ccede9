"""Sharing: is one set of Hadamard vectors enough for several tasks? (The open question of Chen et al. 2023.)"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, check_choice, check_range
from hadamard_toolkit.studies.ablation import PARTS
from hadamard_toolkit.studies.statistics import greater, holm

SOURCES = ("own", "mean", "others", "another", "permuted", "identity")
UNSHARED, BARE = "unshared", "bare"
OWN = "own"  # own vectors, with the head retrained as in all schemes that share
GOAL_SHARE, GOAL_PARAMETERS = 0.98, 0.011  # share of the reference's score; per cent of the backbone per task
Vectors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scheme:
    """Where W, b and the trained norm (its gain and shift) of a task's model come from.

    Each is one of: `"own"`, the task's own; `"mean"`, the mean of all tasks; `"others"`, the mean of all tasks but this
    one; `"another"`, one other task, drawn at random (the same for all three); `"permuted"`, the mean with the
    coordinates of each layer permuted; `"identity"`, W = 1, b = 0, the pretrained norm.
    """

    name: str
    weight: str
    bias: str
    norm: str

    def __post_init__(self) -> None:
        for part in PARTS:
            check_choice(part, getattr(self, part), SOURCES)

    def sources(self) -> tuple[str, ...]:
        """The origins of W, b and norm."""
        return astuple(self)[1:]


SCHEMES = (
    Scheme("own", "own", "own", "own"),
    Scheme("own, shared norm", "own", "own", "mean"),
    Scheme("mean", "mean", "mean", "mean"),
    Scheme("mean, own norm", "mean", "mean", "own"),
    Scheme("leave-one-out", "others", "others", "others"),
    Scheme("shared W, own b", "mean", "own", "mean"),
    Scheme("own W, shared b", "own", "mean", "mean"),
    Scheme("no vectors, own norm", "identity", "identity", "own"),
    Scheme("no vectors, shared norm", "identity", "identity", "mean"),
    Scheme("another task", "another", "another", "another"),
    Scheme("permuted", "permuted", "permuted", "mean"),
    Scheme(BARE, "identity", "identity", "identity"),
)
"""The schemes that are measured. `"own"` is the ceiling (own vectors, the head retrained), `"bare"` is HeadOnly."""


def combine(
    vectors: Mapping[str, Vectors], target: str, scheme: Scheme, identity: Vectors, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """The vectors of `target` under `scheme`: arrays [layers, width] by name, as `Attachment.vectors` names them.

    `vectors`: task -> name -> [layers, width]; `identity` holds the same names before training. `seed` draws the other
    task and the permutations. Means are taken in float64, coordinate by coordinate, all tasks alike.
    Raises `ArgumentError` for a target that is not among the tasks, no other task, or arrays of unequal shapes.
    """
    check_choice("target", target, list(vectors))
    others = [task for task in sorted(vectors) if task != target]
    if not others:
        raise ArgumentError(f"vectors holds no task but {target!r}; there is no task to share with")
    for task in vectors:
        shapes = {name: array.shape for name, array in vectors[task].items()}
        if shapes != {name: array.shape for name, array in identity.items()}:
            raise ArgumentError(f"vectors[{task!r}] has other names or shapes than identity")
    tasks_of = {
        "own": [target],
        "mean": sorted(vectors),
        "others": others,
        "another": [others[np.random.default_rng([seed, 0]).integers(len(others))]],
        "permuted": sorted(vectors),
    }
    combined = {}
    for name, start in identity.items():
        origin = getattr(scheme, part_of(name))
        if origin == "identity":
            combined[name] = start
            continue
        stacked = np.stack([vectors[task][name] for task in tasks_of[origin]])
        mean: np.ndarray = stacked.mean(axis=0, dtype=np.float64)
        if origin == "permuted":
            mean = _permuted(mean, np.asarray(start, np.float64), seed)
        combined[name] = mean.astype(start.dtype)
    return combined


def part_of(name: str) -> str:
    """`"weight"` or `"bias"` of the adapter, or `"norm"`: the part of a `Scheme` that governs this array."""
    place, _, vector = name.rpartition(".")
    if place.endswith("norm"):
        return "norm"
    check_choice("vector", vector, PARTS[:2])
    return vector


def _permuted(values: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    """The change of every layer with its coordinates permuted, W and b alike."""
    generator = np.random.default_rng([seed, 1])
    change = values - start
    return start + np.stack([layer[generator.permutation(layer.size)] for layer in change])


def parameters_per_task(sizes: Mapping[str, int], scheme: Scheme, tasks: int) -> float:
    """Parameters per task under `scheme` for `tasks` tasks without their heads; `sizes` of weight, bias and norm.

    A task's own part counts in full; a shared one is stored once and counts 1 / tasks (so does a leave-one-out mean,
    which is the set that a new task would be given); the identity costs nothing.
    """
    check_range("tasks", tasks, least=1)
    cost = {"own": 1.0, "identity": 0.0}
    return sum(sizes[part] * cost.get(getattr(scheme, part), 1 / tasks) for part in PARTS)


def sharing_by_task(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: scheme (rows, in the order of the table) by task (columns).

    `table`: one row per `task`, `seed` and `scheme` with its `score`, as `measurements.sharing` gives it for each run.
    """
    means = table.groupby(["scheme", "task"], sort=False)["score"].mean().unstack("task")
    return means.reindex(index=table["scheme"].unique(), columns=sorted(table["task"].unique()))


def fair_reference(schemes: Collection[str]) -> str:
    """`"own"` if it was measured, else `"unshared"`; with `"own"` a retrained head is not credited to sharing."""
    return OWN if OWN in schemes else UNSHARED


def sharing_summary(
    table: pd.DataFrame,
    *,
    reference: str | None = None,
    floor: str = BARE,
    margin: float = GOAL_SHARE,
    level: float = 0.95,
) -> pd.DataFrame:
    """Score against cost of every scheme, and its share of the score of `reference`, with intervals over tasks.

    `table`: one row per `task`, `seed` and `scheme` with `score`, `parameters` and `percent` (per task, of the
    backbone). Only tasks and seeds with every scheme count. Seeds are averaged within their task; the tasks are the
    sample. `reference` is `"own"` if the table has it: the heads of all schemes but `"unshared"` are retrained, and a
    share of the unshared score would credit sharing with the gain of a new head.

    Columns: `reference`, `parameters`, `percent`, `score` (mean over tasks); `share` = mean score / mean score of
    `reference`; `gain_share` = the same of the score above that of `floor`; their Fieller intervals (`…_low`,
    `…_high`; NaN where the denominator may be zero, as no interval exists then); `p`, one-sided, of the null that the
    share is below `margin` (paired t over tasks of score - margin * reference), `p_holm` over the schemes;
    `noninferior`: p_holm < 1 - level; `tasks` and `runs` that count, `incomplete` ones that do not.
    Fieller, E. C. (1954), "Some problems in interval estimation", J. R. Stat. Soc. B 16(2).

    Generalises to: other tasks like these, with the same backbone; not to other seeds of one task.

    Simulated: 8 tasks. The share's interval covers 0.95; sharing that costs exactly the margin passes in 0.05, one of
    five such schemes after Holm in 0.04; sharing that costs nothing is shown in 0.98.
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k sharing`
    """
    check_range("level", level, above=0, below=1)
    check_range("margin", margin, above=0)
    scores, dropped = _complete(table)
    reference = fair_reference(list(scores.columns)) if reference is None else reference
    for name in (reference, floor):
        check_choice("scheme", name, list(scores.columns))
    by_task = scores.groupby("task").mean()
    base, ground = by_task[reference].to_numpy(), by_task[floor].to_numpy()
    costs = table.groupby("scheme")[["parameters", "percent"]].mean()
    rows = []
    for scheme in table["scheme"].unique():
        score = by_task[scheme].to_numpy()
        row = {"scheme": scheme, **costs.loc[scheme].to_dict(), "score": score.mean()}
        for name, ratio in (
            ("share", fieller(score, base, level=level)),
            ("gain_share", fieller(score - ground, base - ground, level=level)),
        ):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ratio, strict=True))
        rows.append({**row, "p": math.nan if scheme == reference else greater(score - margin * base)})
    summary = pd.DataFrame(rows).set_index("scheme")
    summary["p_holm"] = holm(summary["p"].to_numpy())
    summary["noninferior"] = summary["p_holm"] < 1 - level
    return summary.assign(reference=reference, tasks=len(by_task), runs=len(scores), incomplete=dropped)


def _complete(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Scores [task and seed, scheme] of the runs with every scheme, and the number of other runs."""
    if table.duplicated(["task", "seed", "scheme"]).any():
        raise ArgumentError("table has more than one row for one task, seed and scheme")
    wide = table.pivot(index=["task", "seed"], columns="scheme", values="score")
    whole = wide.dropna()
    if whole.empty:
        raise ArgumentError("no task and seed of table has a score for every scheme")
    return whole, len(wide) - len(whole)


def fieller(above: np.ndarray, below: np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """mean(above) / mean(below) of paired values with its exact interval under normality (Fieller 1954).

    The interval holds every r for which a paired t test of above - r * below does not reject a mean of zero. Its ends
    are NaN with fewer than two pairs, and where `below` may have a mean of zero, as the set is no interval then.
    Generalises to: other pairs of the kind that was given, such as other tasks.
    """
    above, below = np.asarray(above, float), np.asarray(below, float)
    count, top, bottom = len(above), above.mean(), below.mean()
    ratio = float(top / bottom) if bottom else math.nan
    if count < 2:
        return ratio, math.nan, math.nan
    quantile = stats.t.ppf((1 + level) / 2, count - 1) ** 2 / count
    [[vary_top, both], [_, vary_bottom]] = quantile * np.cov(above, below)
    a, b, c = bottom**2 - vary_bottom, bottom * top - both, top**2 - vary_top
    if a <= 0 or bottom <= 0:
        return ratio, math.nan, math.nan
    root = math.sqrt(max(b * b - a * c, 0.0))
    return ratio, float((b - root) / a), float((b + root) / a)


def goal_reached(
    summary: pd.DataFrame, *, share: float = GOAL_SHARE, percent: float = GOAL_PARAMETERS
) -> dict[str, Any]:
    """Which schemes reach the goal: cost at most `percent` of the backbone and keep `share` of the score.

    `within`: schemes that cost no more, without the reference, best share first; `met`: those of them whose share is at
    least `share`; `shown`: those of `met` that are non-inferior after Holm.
    """
    within = summary[(summary["percent"] <= percent) & summary["p"].notna()]
    within = within.sort_values("share", ascending=False, kind="stable")
    met = within[within["share"] >= share]
    return {
        "within": list(within.index),
        "met": list(met.index),
        "shown": list(met.index[met["noninferior"]]),
    }
