"""Is a choice of layers better than chance, and do tasks agree?

Choices of `layer_ablation` are compared on test rows with subsets of the same size that were drawn blindly.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_range
from hadamard_toolkit.studies.layer_ablation import (
    FIXED,
    LEAVE_ONE_OUT,
    TEST,
    Grid,
    code_of,
    read_grid,
    removal_curves,
)
from hadamard_toolkit.studies.statistics import greater, holm, one_kind, t_interval

QUESTIONS = {
    "tasks": "does the rule choose better than a blind draw?",
    "subset": "is this one subset better than the average of its size?",
    "relabelling": "are these layers better than others kept as consistently?",
}
NO_AGREEMENT = "whose orders are made of each other and agree by construction"
CHANCE_COLUMNS = [
    *("test", "question", "task", "rule", "size", "score", "full", "chance", "gain", "low", "high"),
    *("p", "least_p", "p_holm", "refused", "n_runs", "n_tasks"),
]
EXACT_LAYERS = 8  # up to so many layers all relabellings are counted: 8! = 40,320


def against_chance(removals: pd.DataFrame, paths: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """Run by run: the rank of a rule's subset among all subsets of its size that may be drawn blindly.

    `percentile` counts ties half, 100 is best; `p` is the share of subsets, the rule's own included, that score at
    least as high: exact under the null that the rule draws blindly. Columns of `paths`, then `score`, `chance` (the
    mean of all subsets), `percentile`, `p`, `subsets`. With 15 subsets (4 of 6 layers) p cannot fall below 1/15 in one
    run; `better_than_chance` combines the runs.

    Generalises to: this run alone.

    Simulated: nothing, as p is a count; the best of 6 subsets has 1/6.
    `pytest tests/studies/test_layer_ablation_tests.py -k best_subset`
    """
    grid = read_grid(removals, split)
    run_of = {key: run for run, key in enumerate(grid.runs["key"])}
    rows: list[dict[Any, Any]] = []
    for row in removal_curves(removals, paths, split=split).to_dict("records"):
        pool = grid.score[run_of[row["key"]], grid.of_size(row["size"])]
        if not len(pool):
            continue
        more, same = (pool > row["score"]).sum(), (pool == row["score"]).sum()
        absent = int(same == 0)  # a rule's own subset counts among those that might have been drawn
        percentile = 100 * (1 - (more + same / 2) / len(pool))
        p = (more + same + absent) / (len(pool) + absent)
        rows.append({**row, "chance": pool.mean(), "percentile": percentile, "p": p, "subsets": len(pool)})
    return pd.DataFrame(rows)


def better_than_chance(
    removals: pd.DataFrame,
    paths: pd.DataFrame,
    *,
    split: str = TEST,
    by: str | None = None,
    test: str | None = None,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Does a rule choose better layers than a blind draw? Two tests; each row says which question it answers.

    `test="tasks"`: a one-sided t test over tasks of the score of the choice minus the mean over all subsets of that
    size that may be drawn blindly, with the interval `low`, `high`. For a rule that chooses for each task separately,
    the question is whether the rule beats a blind draw. A choice common to all tasks (`consensus`, `first`, `last`) is
    one subset; the question is then whether this subset is better than the average one, in a family of its own.

    `test="relabelling"`: one permutation π of the layer numbers, the same for all runs, is applied to everything that
    the rule kept; p is the share of π that score at least as high. Choices stay as alike from run to run as they are,
    so the question is whether these layers are better than others that would be kept as consistently. An order that
    all tasks share is hard to detect: all runs then keep one subset, and p is at least 1 / C(L, size). Up to 8 layers
    all L! permutations are counted; beyond, the mean is ranked among random subsets that all runs share,
    p = (1 + #{as good})/(1 + drawn).

    Without `test` both are made; with `by="task"` each task separately, by relabelling alone. `p_holm` corrects over
    the rules and sizes of one question (Holm 1979). A test whose least possible p could not reject at `alpha` (Tarone
    1990) is refused: it has no p, does not count in the correction, and `refused` says why. To avoid this, pass only
    the rules and sizes that were chosen before looking.

    Generalises to: `"tasks"`, other tasks on this backbone; `"relabelling"`, nothing beyond these runs and rows.

    Columns: `test`, `question`, `task` (or `"all tasks"`), `rule`, `size`, `score`, `full`, `chance`, `gain` = score −
    chance, `low`, `high`, `p`, `least_p`, `p_holm`, `refused`, `n_runs`, `n_tasks`. Raises `DataError` where tasks of
    accuracy and of correlation would be averaged.

    Simulated: 9 tasks, 6 layers. Size over tasks 0.05 (greedy on noise; random orders where layers differ), after Holm
    0.03. An order that all tasks share, worth 3.5 points at four layers, is found after Holm in 0.99 (greedy) and 1.00
    (consensus) over tasks, in 0.62 and 0.04 by relabelling. One random order given to all tasks is claimed in 0.55 over
    tasks, in 0.00 by relabelling: a rule whose orders agree for other reasons (`rank_agreement`) chooses one subset.
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k chance`
    """
    check_choice("by", by, (None, "task"))
    check_choice("test", test, (None, "tasks", "relabelling") if by is None else (None, "relabelling"))
    check_range("alpha", alpha, above=0, below=1)
    if by is None:
        _one_kind(removals)
    grid = read_grid(removals, split)
    groups = {"all tasks": np.arange(len(grid.runs))} if by is None else grid.by_task()
    codes = paths.assign(code=paths["kept"].map(code_of))
    wide = codes.pivot(index="key", columns=["rule", "size"], values="code").reindex(grid.runs["key"])
    pairs: list[tuple[str, int]] = list(wide.columns)  # type: ignore[arg-type]
    chosen = dict(zip(pairs, wide.to_numpy(dtype=float, na_value=np.nan).T, strict=True))
    tests = {"tasks": _over_tasks, "relabelling": _by_relabelling}
    wanted = [test] if test else ["relabelling"] if by else list(tests)
    rows: list[dict[str, Any]] = []
    for (task, runs), kind in itertools.product(groups.items(), wanted):
        for (rule, size), by_run in chosen.items():
            if not 0 < size < grid.layers or np.isnan(by_run[runs]).any():
                continue
            kept = by_run[runs].astype(int)
            if np.isnan(grid.score[runs, kept]).any():
                continue
            if (result := tests[kind](grid, runs, kept, size)) is None:
                continue
            question = QUESTIONS["subset" if kind == "tasks" and rule in LEAVE_ONE_OUT + FIXED else kind]
            row = {"test": kind, "question": question, "task": task, "rule": rule, "size": size, **result}
            row |= {"full": grid.score[runs, -1].mean(), "n_runs": len(runs)}
            rows.append({**row, "n_tasks": grid.runs["task"].iloc[runs].nunique()})
    table = pd.DataFrame(rows, columns=CHANCE_COLUMNS).assign(p_holm=np.nan, refused="")
    for _, family in table.groupby(["task", "question"]):
        able, bound = _able(family["least_p"].to_numpy(dtype=float), alpha)
        kept, refused = family.index[able], family.index[~able]
        table.loc[kept, "p_holm"] = holm(family.loc[kept, "p"])
        table.loc[refused, "refused"] = [
            f"could never be significant: least p {least:.3f}, bound {bound:.2g} of {len(family)} tests"
            for least in family.loc[refused, "least_p"]
        ]
        table.loc[refused, "p"] = np.nan
    return table


def _able(least: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """Which tests can still reject after a correction for all that can, and at what bound (Tarone 1990)."""
    for count in range(1, len(least) + 1):
        if (least <= alpha / count).sum() <= count:
            break
    return least <= alpha / count, alpha / count


def _one_kind(removals: pd.DataFrame) -> None:
    """Raise `DataError` for tasks of accuracy together with tasks of a correlation, which have no mean."""
    one_kind(removals)
    if "metric" not in removals.columns and "correct" in removals.columns:
        ranked = removals["correct"].isna().groupby(removals["task"]).any()
        if ranked.any() and not ranked.all():
            raise DataError(
                f"removals holds tasks scored by accuracy, and {', '.join(ranked.index[ranked])} by a correlation; "
                'they have no common unit: give those of one kind, or by="task"'
            )


def _over_tasks(grid: Grid, runs: np.ndarray, kept: np.ndarray, size: int) -> dict[str, float] | None:
    """A t test over tasks of what the choice scores above the mean of the pool."""
    pool = grid.of_size(size)
    if not len(pool):
        return None
    by_run = np.stack([grid.score[runs, kept], grid.score[np.ix_(runs, pool)].mean(axis=1)])
    _, task = np.unique(grid.runs["task"].to_numpy(dtype=str)[runs], return_inverse=True)
    score, chance = np.stack([np.bincount(task, values) for values in by_run]) / np.bincount(task)
    gains = score - chance
    gain, low, high = t_interval(gains)
    # two tasks or more can have any p; one has no spread to judge by
    p, least = greater(gains), float(len(gains) < 2)
    means = {"score": score.mean(), "chance": chance.mean(), "gain": gain}
    return {**means, "low": low, "high": high, "p": p, "least_p": least}


def _by_relabelling(grid: Grid, runs: np.ndarray, kept: np.ndarray, size: int) -> dict[str, float] | None:
    """The rank of the choice among its relabellings."""
    null = _null(grid, runs, kept, size)
    if null is None:
        return None
    score, chance = grid.score[runs, kept].mean(), null.mean()
    p, least = ((null >= bound - 1e-12).mean() for bound in (score, null.max()))
    means = {"score": score, "chance": chance, "gain": score - chance}
    return {**means, "low": np.nan, "high": np.nan, "p": p, "least_p": least}


def _null(grid: Grid, runs: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray | None:
    """Mean scores of blind choices and of the observed one; None if too few subsets were scored."""
    if grid.layers <= EXACT_LAYERS:
        moved = _relabelled(grid.layers, kept)
        if np.isfinite(scores := grid.score[runs[None], moved]).all():
            return np.asarray(scores.mean(axis=1))
    pool = grid.of_size(size)
    if not len(pool):
        return None
    observed = grid.score[runs, kept].mean()
    return np.append(grid.score[np.ix_(runs, pool)].mean(axis=0), observed)


@cache
def _permutations(layers: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(layers))))


def _relabelled(layers: int, codes: np.ndarray) -> np.ndarray:
    """[L!, codes]: each code with its layers renumbered by each permutation."""
    permutations = _permutations(layers)
    kept = (codes[:, None] >> np.arange(layers)) & 1
    return np.asarray((2**permutations) @ kept.T)


def rank_agreement(paths: pd.DataFrame) -> pd.DataFrame:
    """Do tasks remove layers in one order? Kendall's W = 12 S / (m² (L³ − L)), from 0 (none) to 1 (the same order).

    The m orders are the tasks' (mean rank over seeds), S the squared deviations of the layers' rank sums, p that of
    Friedman's χ² = m (L − 1) W with L − 1 degrees of freedom (Kendall and Smith 1939), approximate for few tasks.

    The orders must be independent, as those of `greedy` and of scores are. A leave-one-out order (`consensus`) is a
    mean over the other tasks: any two of them share all but two tasks and agree by construction, in noise as well. It
    is refused: its row has the order, but no W and no p, and `refused` says why. `first` and `last`, which are the
    same order for all tasks, are left out.

    Generalises to: nothing beyond these tasks; the null is that each of them orders its layers at random.

    Columns: `rule`, `order` (removed first to last, by mean rank: Borda), `w`, `p`, `n_tasks`, `n_runs`, `refused`.
    W and p are NaN for one task. Raises `ArgumentError` if no rule is left to test.

    Simulated: size 0.04 at 9 tasks and 0.01 at 3 (orders of greedy elimination in noise), power 0.99 where one order
    is planted; leave-one-out orders in noise have W of about 0.8 and would reject always.
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k agreement`
    """
    independent = set(paths["rule"]) - {*LEAVE_ONE_OUT, *FIXED}
    if not independent:
        raise ArgumentError(
            f"paths holds only the rules {sorted(set(paths['rule']))}, {NO_AGREEMENT}; "
            "give rules that choose task by task"
        )
    rows = []
    for rule, part in paths[paths["removed"] >= 0].groupby("rule", sort=False):
        if rule in FIXED:
            continue
        ranks = -part.pivot(index="key", columns="removed", values="size")
        tasks = part.drop_duplicates("key").set_index("key")["task"].reindex(ranks.index)
        by_task = ranks.groupby(tasks).mean().rank(axis=1)
        m, layers = by_task.shape
        order = write_order(by_task.mean().sort_values(kind="stable").index)
        w = p = np.nan
        if rule in independent and m > 1:
            sums = by_task.sum()
            w = 12 * ((sums - sums.mean()) ** 2).sum() / (m**2 * (layers**3 - layers))
            p = stats.chi2.sf(m * (layers - 1) * w, layers - 1)
        sizes = {"n_tasks": m, "n_runs": len(ranks)}
        refused = "" if rule in independent else NO_AGREEMENT
        rows.append({"rule": rule, "order": order, "w": w, "p": p, **sizes, "refused": refused})
    return pd.DataFrame(rows)


def write_order(layers: Collection[int]) -> str:
    """An order of layers as text, such as `"5,0,3"`."""
    return ",".join(str(layer) for layer in layers)
