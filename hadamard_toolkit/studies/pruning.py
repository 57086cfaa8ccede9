"""Is a choice of layers better than chance, how few are enough, and do tasks agree?

What `layers` chose is judged here: on test rows, against subsets of the same size that were drawn blindly, or against
all layers within a margin.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import ArgumentError, check_choice, check_range
from hadamard_toolkit.studies.layers import (
    HELD_OUT,
    TEST,
    _Grid,
    _grid,
    read_correct,
    read_kept,
    removal_curves,
)
from hadamard_toolkit.studies.statistics import hierarchical_bootstrap, holm, tost

EXACT_LAYERS = 8  # up to so many layers all relabellings are counted: 8! = 40,320


def against_chance(removals: pd.DataFrame, paths: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """Run by run: where the subset of a rule stands among all subsets of its size that may be drawn blindly.

    `percentile` counts ties half, 100 is best; `p` = share of subsets that score at least as high, itself among them:
    exact under the null that the rule might as well have drawn blindly. Columns of `paths`, then `score`, `chance` (the
    pool's mean), `percentile`, `p`, `subsets`. With 15 subsets (4 of 6 layers) p cannot go below 1/15 in one run:
    `better_than_chance` puts the runs together.
    """
    grid = _grid(removals, split)
    places = {key: place for place, key in enumerate(grid.runs["key"])}
    rows: list[dict[Any, Any]] = []
    for row in removal_curves(removals, paths, split=split).to_dict("records"):
        pool = grid.score[places[row["key"]], grid.of_size(row["size"])]
        if not len(pool):
            continue
        more, same = (pool > row["score"]).sum(), (pool == row["score"]).sum()
        listed = same > 0  # a rule's own subset is always one of those that might have been drawn
        told = {"chance": pool.mean(), "percentile": 100 * (1 - (more + same / 2) / len(pool))}
        rows.append(
            {
                **row,
                **told,
                "p": (more + same + (not listed)) / (len(pool) + (not listed)),
                "subsets": len(pool),
            }
        )
    return pd.DataFrame(rows)


def better_than_chance(
    removals: pd.DataFrame, paths: pd.DataFrame, *, split: str = TEST, by: str | None = None
) -> pd.DataFrame:
    """Does a rule choose better layers than a blind draw, over all runs together, or per task with `by="task"`?

    The statistic is the mean over runs of the score of what the rule kept. Its null relabels the layers: one
    permutation π of the layer numbers, the same for all runs, is put on everything that the rule kept. That keeps how
    alike its choices are from run to run, so runs of one task, seeds and tasks need not be independent. With up to 8
    layers all L! permutations are counted and p is exact; beyond, a rule's mean is ranked among random subsets that
    all runs share, p = (1 + #{as good})/(1 + drawn). `p_holm` corrects over the rules and sizes of each group.

    Columns: `task` (or `"all tasks"`), `rule`, `size`, `score`, `full`, `chance`, `gain` = score − chance, `p`,
    `least_p` (the smallest that could have come out), `p_holm`, `n_runs`, `n_tasks`.
    """
    check_choice("by", by, (None, "task"))
    grid = _grid(removals, split)
    groups: dict[str, np.ndarray] = {"all tasks": np.arange(len(grid.runs))}
    if by == "task":
        groups = grid.by_task()
    codes = paths["kept"].map(lambda kept: sum(2**layer for layer in read_kept(kept)))
    wide = (
        paths.assign(code=codes)
        .pivot(index="key", columns=["rule", "size"], values="code")
        .reindex(grid.runs["key"])
    )
    pairs: list[tuple[str, int]] = list(wide.columns)  # type: ignore[arg-type]
    chosen = dict(zip(pairs, wide.to_numpy(dtype=float, na_value=np.nan).T, strict=True))
    tasks = grid.runs["task"].to_numpy(dtype=object)
    rows: list[dict[str, Any]] = []
    for task, runs in groups.items():
        begun = len(rows)
        fixed = {"full": grid.score[runs, -1].mean(), "n_runs": len(runs), "n_tasks": len(set(tasks[runs]))}
        for (rule, size), by_run in chosen.items():
            own = by_run[runs]
            if not 0 < size < grid.layers or np.isnan(own).any():
                continue
            null = _null(grid, runs, own.astype(int), size)
            if null is None:
                continue
            score = grid.score[runs, own.astype(int)].mean()
            told = {"task": task, "rule": rule, "size": size, "score": score, "chance": null.mean()}
            told |= {"gain": score - null.mean(), "p": (null >= score - 1e-12).mean()}
            rows.append({**told, **fixed, "least_p": (null >= null.max() - 1e-12).mean()})
        adjusted = holm([row["p"] for row in rows[begun:]])
        for row, p in zip(rows[begun:], adjusted, strict=True):
            row["p_holm"] = p
    columns = [
        "task",
        "rule",
        "size",
        "score",
        "full",
        "chance",
        "gain",
        "p",
        "least_p",
        "p_holm",
        "n_runs",
        "n_tasks",
    ]
    return pd.DataFrame(rows, columns=columns)


def _null(grid: _Grid, runs: np.ndarray, own: np.ndarray, size: int) -> np.ndarray | None:
    """Mean scores under blind choices, the observed one among them; None if too few subsets were scored."""
    if np.isnan(grid.score[runs, own]).any():
        return None
    if grid.layers <= EXACT_LAYERS:
        moved = _relabelled(grid.layers, own)
        if np.isfinite(scores := grid.score[runs[None], moved]).all():
            return np.asarray(scores.mean(axis=1))
    pool = grid.of_size(size)
    if not len(pool):
        return None
    observed = grid.score[runs, own].mean()
    return np.append(grid.score[np.ix_(runs, pool)].mean(axis=0), observed)


@cache
def _permutations(layers: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(layers))))


def _relabelled(layers: int, codes: np.ndarray) -> np.ndarray:
    """[L!, codes]: each code with its layers renumbered by each permutation."""
    permutations = _permutations(layers)
    kept = (codes[:, None] >> np.arange(layers)) & 1
    return np.asarray((2**permutations) @ kept.T)


# the smallest set ------------------------------------------------------------------------------------------------


def smallest_set(
    removals: pd.DataFrame,
    paths: pd.DataFrame,
    *,
    margin: float = 0.02,
    alpha: float = 0.05,
    rule: str = "greedy",
    draws: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Per task, how few layers of a rule's path stay within `margin` of all layers.

    From all layers downwards, each size is tested on held-out rows: not worse than full by `margin` or more, at level
    `alpha`; the first size that fails ends the walk, so no correction is needed (fixed sequence; Maurer et al. 1995).
    The size chosen so is then confirmed, or not, on test rows, with the same test. Where the table tells which rows
    are right, the test is the lower bound of a hierarchical bootstrap of the paired difference in accuracy over seeds
    and rows (`measure` = `"accuracy"`, whatever the task's metric); for regression, the lower one-sided test of `tost`
    over seeds (`measure` = `"score"`). A set that is *better* than full passes; that is why one side is enough.

    Where nothing can go, `size` is that of full and there is nothing to confirm.
    Held-out rows chose the path too, so their difference is a little flattering; the one on test rows is not.

    Columns: `task`, `rule`, `margin`, `size`, `layers` (of full), `kept` (per seed, `"seed: 0,1"` joined by `"; "`),
    `held_out`, `held_out_low`, `test`, `test_low` (differences to full and their one-sided 1 − alpha bounds),
    `confirmed`, `test_score`, `test_full` (the metric), `measure`, `n_seeds`, `n_held_out`, `n_test`.
    """
    check_range("margin", margin, above=0)
    check_range("alpha", alpha, above=0, below=0.5)
    check_choice("rule", rule, sorted(set(paths["rule"])))
    own = paths[paths["rule"] == rule]
    scored = removals.merge(own[["key", "kept", "size"]], on=["key", "kept"], validate="many_to_many")
    rows = []
    for task, part in scored.groupby("task"):
        layers = int(part["size"].max())
        size, held_out = layers, None
        for smaller in range(layers - 1, -1, -1):
            found = _not_worse(part, smaller, HELD_OUT, alpha, draws, seed)
            if found is None or not found["low"] > -margin:
                break
            size, held_out = smaller, found
        held_out = held_out or {"difference": 0.0, "low": 0.0, **_sizes(part, HELD_OUT)}
        tested = _not_worse(part, size, TEST, alpha, draws, seed) if size < layers else None
        tested = tested or {"difference": 0.0, "low": 0.0, **_sizes(part, TEST)}
        at = part[part["split"] == TEST]
        of_size = own[(own["task"] == task) & (own["size"] == size)]
        rows.append(
            {
                **{"task": task, "rule": rule, "margin": margin, "size": size, "layers": layers},
                "kept": "; ".join(
                    f"{s}: {kept}" for s, kept in zip(of_size["seed"], of_size["kept"], strict=True)
                ),
                **{"held_out": held_out["difference"], "held_out_low": held_out["low"]},
                **{"test": tested["difference"], "test_low": tested["low"]},
                "confirmed": bool(size < layers and tested["low"] > -margin),
                "test_score": at.loc[at["size"] == size, "score"].mean(),
                "test_full": at.loc[at["size"] == layers, "score"].mean(),
                "measure": tested["measure"],
                **{"n_seeds": tested["n_seeds"], "n_held_out": held_out["n"], "n_test": tested["n"]},
            }
        )
    return pd.DataFrame(rows)


def _sizes(part: pd.DataFrame, split: str) -> dict[str, Any]:
    rows = part[part["split"] == split]
    full = rows[rows["size"] == rows["size"].max()]
    n = int(full["n"].sum() if split == HELD_OUT else full["n"].max()) if "n" in rows.columns else 0
    return {"n_seeds": full["seed"].nunique(), "n": n, "measure": _measure(rows)}


def _measure(rows: pd.DataFrame) -> str:
    return "accuracy" if "correct" in rows.columns and rows["correct"].notna().all() else "score"


def _not_worse(
    part: pd.DataFrame, size: int, split: str, alpha: float, draws: int, seed: int
) -> dict[str, Any] | None:
    """Difference to full, and its one-sided lower bound; None if that size was not scored."""
    rows = part[part["split"] == split]
    full = rows[rows["size"] == rows["size"].max()].set_index("key")
    less = rows[rows["size"] == size].set_index("key").reindex(full.index)
    if less["score"].isna().any():
        return None
    sizes = _sizes(part, split)
    if _measure(rows) == "score":
        found = tost(less["score"] - full["score"], 1.0, alpha=alpha).iloc[0]
        return {**sizes, "difference": found["difference"], "low": found["low"]}
    right = [
        [read_correct(c, int(n)) for c, n in zip(table["correct"], table["n"], strict=True)]
        for table in (less, full)
    ]
    own = "own" if split == HELD_OUT else "shared"
    found = hierarchical_bootstrap(*right, examples=own, draws=draws, level=1 - 2 * alpha, seed=seed).iloc[0]
    return {**sizes, "difference": found["estimate"], "low": found["low"]}


def kept_share(paths: pd.DataFrame, sizes: Mapping[str, int] | int) -> pd.DataFrame:
    """How often each layer is among those kept: per task and layer the share of runs.

    `paths` of one rule; `sizes` is the number of layers kept, one for all tasks or by task (such as those of
    `smallest_set`). Columns: `task`, `layer`, `share`, `size`, `n_runs`.
    """
    if paths["rule"].nunique() != 1:
        raise ArgumentError(f"paths holds rules {sorted(set(paths['rule']))}; give one of them")
    layers = int(paths["size"].max())
    rows = []
    for task, part in paths.groupby("task"):
        size = sizes if isinstance(sizes, int) else sizes[str(task)]
        kept = [read_kept(text) for text in part.loc[part["size"] == size, "kept"]]
        for layer in range(layers):
            share = float(np.mean([layer in own for own in kept]))
            rows.append({"task": task, "layer": layer, "share": share, "size": size, "n_runs": len(kept)})
    return pd.DataFrame(rows)


def rank_agreement(paths: pd.DataFrame) -> pd.DataFrame:
    """Do runs remove layers in one order? Kendall's W = 12 S / (m² (L³ − L)), from 0 (none) to 1 (the same order).

    The m orders are the tasks' (mean rank over seeds), S the squared deviations of the layers' rank sums, p that of
    Friedman's χ² = m (L − 1) W with L − 1 degrees of freedom (Kendall and Smith 1939), approximate for few tasks.
    One row per rule, `first` and `last` left out: `rule`, `order` (removed first to last, by mean rank: Borda), `w`,
    `p`, `n_tasks`, `n_runs`. W and p are NaN for one task.
    """
    from scipy import stats

    rows = []
    for rule, part in paths[paths["removed"] >= 0].groupby("rule", sort=False):
        ranks = -part.pivot(index="key", columns="removed", values="size")
        tasks = part.drop_duplicates("key").set_index("key")["task"].reindex(ranks.index)
        by_task = ranks.groupby(tasks).mean().rank(axis=1)
        m, layers = by_task.shape
        if rule in ("first", "last"):
            continue
        sums = by_task.sum()
        w = 12 * ((sums - sums.mean()) ** 2).sum() / (m**2 * (layers**3 - layers)) if m > 1 else np.nan
        p = stats.chi2.sf(m * (layers - 1) * w, layers - 1) if m > 1 else np.nan
        order = write_order(by_task.mean().sort_values(kind="stable").index)
        rows.append({"rule": rule, "order": order, "w": w, "p": p, "n_tasks": m, "n_runs": len(ranks)})
    return pd.DataFrame(rows, columns=["rule", "order", "w", "p", "n_tasks", "n_runs"])


def write_order(layers: Collection[int]) -> str:
    """An order of layers as text, such as `"5,0,3"`."""
    return ",".join(str(layer) for layer in layers)
