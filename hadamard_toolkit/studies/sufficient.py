"""How few layers are enough? The smallest set within a margin of all, chosen on held-out, confirmed on test rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import ArgumentError, check_choice, check_range
from hadamard_toolkit.studies.layer_ablation import (
    HELD_OUT,
    ON_HELD_OUT_ROWS,
    TEST,
    code_of,
    greedy_order,
    read_correct,
    read_kept,
)
from hadamard_toolkit.studies.statistics import hierarchical_bootstrap, t_interval

Pairs = tuple[list[np.ndarray], list[np.ndarray]]  # per seed, of the smaller set and of all layers


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

    From all layers downwards, each size is tested on held-out rows at level `alpha`: not worse than full by `margin` or
    more. The first size that fails ends the walk, so no correction is needed (fixed sequence; Maurer et al. 1995). The
    same test on test rows then confirms the chosen size, or does not. Where the table says which rows are right, the
    test is the lower bound of a hierarchical bootstrap of the paired difference in accuracy over seeds and rows
    (`measure` = `"accuracy"`, whatever the task's metric); for regression, it is the lower one-sided test of `tost`
    over seeds (`measure` = `"score"`). The test is one-sided because a set that is *better* than full passes too.

    No row judges a path that it helped to choose. `greedy` is cross-fitted: the path is chosen on one half of the
    held-out rows of a run and judged on the other, then the halves are swapped (for regression: chosen by the other
    seeds, judged on this one). The walk therefore says how few layers greedy elimination can be trusted with; `kept` is
    its path on all held-out rows. Orders that used none of these rows (norms, other tasks, `first`, `last`) are judged
    on all of them; `taylor` and `fisher`, whose gradients are those of held-out rows, are refused.

    Where no layer can be removed, `size` is that of full and there is nothing to confirm. `ended` says why the walk
    ended: `"bound"`, `"not scored"` (one half of the rows would keep layers that were not scored; beyond 6 layers not
    all subsets are), or `"no layer left"`.

    Generalises to: other rows and, as far as there are several, other seeds; not to other tasks.

    Columns: `task`, `rule`, `margin`, `size`, `layers` (of full), `kept` (per seed, `"seed: 0,1"` joined by `"; "`),
    `held_out`, `held_out_low`, `test`, `test_low` (differences to full and their one-sided 1 − alpha bounds),
    `confirmed`, `test_score`, `test_full` (the metric), `measure`, `ended`, `n_seeds`, `n_held_out`, `n_test`; `worth`,
    what all layers are worth together (their test score less that of none), and `verdict`. Where `worth` is not above
    the margin the verdict is `"nothing learned"`: there any set is as good as all layers, whatever the bounds say.
    Otherwise it is `"enough"` (confirmed), `"not confirmed"`, or `"all layers stay"`.

    Simulated: 3 seeds, first steps that truly cost the margin. The walk lets one pass in 0.04 (100 and 300 held-out
    rows; 0.50 and 0.54 if the rows that chose the path judge it; with one seed 0.08 to 0.09), and test rows confirm it
    in 0.00, with one seed in 0.01. Two layers of five
    that cost nothing are found and confirmed in 0.99 (300 rows, margin 0.04).
    `pytest -m benchmark tests/benchmarks/test_simulations.py -s -k smallest`
    """
    check_range("margin", margin, above=0)
    check_range("alpha", alpha, above=0, below=0.5)
    check_choice("rule", rule, sorted(set(paths["rule"])))
    if rule in ON_HELD_OUT_ROWS:
        raise ArgumentError(
            f"rule={rule!r} is not allowed: its scores come from the held-out rows that would judge it; "
            "greedy is cross-fitted, and norm, consensus, first and last saw none of them"
        )
    chosen = paths[paths["rule"] == rule]
    scored = removals.merge(chosen[["key", "kept", "size"]], on=["key", "kept"], validate="many_to_many")
    rows = []
    fitted: Mapping[int, Pairs | None]
    for task, part in scored.groupby("task"):
        layers = int(part["size"].max())
        if rule == "greedy":
            of_task = removals[(removals["task"] == task) & (removals["split"] == HELD_OUT)]
            fitted = _cross_fitted(of_task, layers, seed)
        else:
            fitted = {size: _pairs(part, size, HELD_OUT) for size in range(layers)}
        measures = {split: _measure(part[part["split"] == split]) for split in (HELD_OUT, TEST)}
        nothing = {"difference": 0.0, "low": 0.0}
        size, held_out, tested, ended = layers, nothing, nothing, "no layer left"
        for smaller in range(layers - 1, -1, -1):
            if (pairs := fitted.get(smaller)) is None:
                ended = "not scored"
                break
            bound = _not_worse(pairs, measures[HELD_OUT], "own", alpha, draws, seed)
            if not bound["low"] > -margin:
                ended = "bound"
                break
            size, held_out = smaller, bound
        if size < layers and (pairs := _pairs(part, size, TEST)):
            tested = _not_worse(pairs, measures[TEST], "shared", alpha, draws, seed)
        at = part[part["split"] == TEST]
        of_size = chosen[(chosen["task"] == task) & (chosen["size"] == size)]
        kept = [f"{s}: {kept}" for s, kept in zip(of_size["seed"], of_size["kept"], strict=True)]
        confirmed = bool(size < layers and tested["low"] > -margin)
        worth = at.loc[at["size"] == layers, "score"].mean() - at.loc[at["size"] == 0, "score"].mean()
        verdict = "enough" if confirmed else "not confirmed" if size < layers else "all layers stay"
        rows.append(
            {
                "task": task,
                "rule": rule,
                "margin": margin,
                "size": size,
                "layers": layers,
                "kept": "; ".join(kept),
                "held_out": held_out["difference"],
                "held_out_low": held_out["low"],
                "test": tested["difference"],
                "test_low": tested["low"],
                "confirmed": confirmed,
                "test_score": at.loc[at["size"] == size, "score"].mean(),
                "test_full": at.loc[at["size"] == layers, "score"].mean(),
                "measure": measures[TEST],
                "ended": ended,
                **_counts(part),
                "worth": worth,
                "verdict": "nothing learned" if worth <= margin else verdict,
            }
        )
    return pd.DataFrame(rows)


def _counts(part: pd.DataFrame) -> dict[str, int]:
    full = part[part["size"] == part["size"].max()]
    n = full.groupby("split")["n"] if "n" in full.columns else None
    return {
        "n_seeds": full["seed"].nunique(),
        "n_held_out": int(n.sum()[HELD_OUT]) if n is not None else 0,
        "n_test": int(n.max()[TEST]) if n is not None else 0,
    }


def _measure(rows: pd.DataFrame) -> str:
    return "accuracy" if "correct" in rows.columns and rows["correct"].notna().all() else "score"


def _right(rows: pd.DataFrame) -> list[np.ndarray]:
    """Which rows are right, subset by subset; the score alone where the table does not say."""
    if _measure(rows) == "score":
        return [np.array([score]) for score in rows["score"]]
    return [read_correct(bits, int(n)) for bits, n in zip(rows["correct"], rows["n"], strict=True)]


def _pairs(part: pd.DataFrame, size: int, split: str) -> Pairs | None:
    """What the rule kept at `size` and all layers, run by run; None if that size was not scored."""
    rows = part[part["split"] == split]
    full = rows[rows["size"] == rows["size"].max()].set_index("key")
    less = rows[rows["size"] == size].set_index("key").reindex(full.index)
    return None if less["score"].isna().any() else (_right(less), _right(full))


def _cross_fitted(rows: pd.DataFrame, layers: int, seed: int) -> dict[int, Pairs]:
    """Greedy elimination at each size, judged by rows (or seeds) that did not choose; sizes that were scored."""
    runs = []
    for _, run in rows.groupby("key", sort=False):
        codes = run["kept"].map(code_of).tolist()
        loss = run["loss"].tolist() if "loss" in run.columns else [0.0] * len(run)
        runs.append((dict(zip(codes, _right(run), strict=True)), dict(zip(codes, loss, strict=True))))
    judged = _by_halves(runs, layers, seed) if _measure(rows) == "accuracy" else _by_seeds(runs, layers)
    full = 2**layers - 1
    return {
        size: ([by_size[size] for by_size in judged], [right[full] for right, _ in runs])
        for size in range(layers)
        if judged and all(size in by_size for by_size in judged)
    }


def _by_halves(runs: list[Any], layers: int, seed: int) -> list[dict[int, np.ndarray]]:
    """Each half of a run's rows judges the path that the other half chose."""
    judged = []
    for index, (right, _) in enumerate(runs):
        n = len(right[2**layers - 1])
        first = np.zeros(n, dtype=bool)
        first[np.random.default_rng([seed, index, n]).permutation(n)[: n // 2]] = True
        of_first, of_second = (
            # the losses are of all rows and may not choose: ties go to the lower layer
            _path(_order({code: correct[half].mean() for code, correct in right.items()}, {}, layers), layers)
            for half in (first, ~first)
        )
        judged.append(
            {
                size: np.where(first, right[of_second[size]], right[of_first[size]])
                for size in of_first.keys() & of_second.keys()
                if of_first[size] in right and of_second[size] in right
            }
        )
    return judged


def _by_seeds(runs: list[Any], layers: int) -> list[dict[int, np.ndarray]]:
    """Each seed judges the mean order of the others; nothing with one seed."""
    orders = [_order({code: score[0] for code, score in right.items()}, loss, layers) for right, loss in runs]
    if len(runs) < 2 or any(len(order) < layers for order in orders):
        return []
    ranks = np.argsort(orders, axis=1)
    judged = []
    for index, (right, _) in enumerate(runs):
        mean = np.delete(ranks, index, axis=0).mean(axis=0)
        path = _path(np.argsort(mean, kind="stable").tolist(), layers)
        judged.append({size: right[code] for size, code in path.items() if code in right})
    return judged


def _order(score: Mapping[int, float], loss: Mapping[int, float], layers: int) -> list[int]:
    """`greedy_order` of scores and losses by the code of the subset."""
    scores, losses = np.full(2**layers, np.nan), np.zeros(2**layers)
    scores[list(score)] = list(score.values())
    losses[list(loss)] = list(loss.values())
    return greedy_order(scores, np.nan_to_num(losses), layers)


def _path(order: list[int], layers: int) -> dict[int, int]:
    """The code of what is kept at each size that the order reaches."""
    codes = 2**layers - 1 - np.cumsum([2**layer for layer in order], dtype=int)
    return {layers - removed: int(code) for removed, code in enumerate(codes, start=1)}


def _not_worse(
    pairs: Pairs, measure: str, examples: str, alpha: float, draws: int, seed: int
) -> dict[str, float]:
    """Difference to full, and its one-sided lower bound."""
    less, full = pairs
    level = 1 - 2 * alpha
    if measure == "score":
        difference, low, _ = t_interval(np.concatenate(less) - np.concatenate(full), level=level)
        return {"difference": difference, "low": low}
    row = hierarchical_bootstrap(less, full, examples=examples, draws=draws, level=level, seed=seed).iloc[0]
    return {"difference": row["estimate"], "low": row["low"]}


def kept_share(paths: pd.DataFrame, sizes: pd.DataFrame | Mapping[str, int] | int) -> pd.DataFrame:
    """How often each layer is kept: per task and layer the share of runs.

    `paths` of one rule; `sizes` is the table of `smallest_set`, or the number of layers kept, one for all tasks or by
    task. Columns: `task`, `layer`, `share`, `size`, `n_runs`, and with a table of `smallest_set` also `confirmed`:
    whether its verdict is `"enough"`.
    """
    if paths["rule"].nunique() != 1:
        raise ArgumentError(f"paths holds rules {sorted(set(paths['rule']))}; give one of them")
    layers = int(paths["size"].max())
    table = sizes.set_index("task") if isinstance(sizes, pd.DataFrame) else None
    wanted = sizes if table is None else table["size"].to_dict()
    rows = []
    for task, part in paths.groupby("task"):
        size = wanted if isinstance(wanted, int) else wanted[str(task)]
        kept = [read_kept(text) for text in part.loc[part["size"] == size, "kept"]]
        for layer in range(layers):
            share = float(np.mean([layer in subset for subset in kept]))
            rows.append({"task": task, "layer": layer, "share": share, "size": size, "n_runs": len(kept)})
    shares = pd.DataFrame(rows)
    return (
        shares if table is None else shares.assign(confirmed=shares["task"].map(table["verdict"] == "enough"))
    )
