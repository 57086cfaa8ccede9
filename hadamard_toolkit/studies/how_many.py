"""How many numbers does a task need? What k trained coefficients bring, as a share of what the whole adapter brings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.subspace import Subspace
from hadamard_toolkit.adapters.tuning import HeadOnly
from hadamard_toolkit.errors import DataError, check_choice, check_range
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.frames import require_columns
from hadamard_toolkit.studies.picked import most_seeds
from hadamard_toolkit.studies.statistics import power_of, t_interval
from hadamard_toolkit.studies.subspace import KINDS

HEAD, UNSHARED = "head alone", "unshared"
MEASURES = ("gap", "score")
ENOUGH, TOO_FEW, OPEN = "enough", "too few", "cannot be told"


def coefficient_scores(store: RunStore, *, split: str = "test") -> pd.DataFrame:
    """Headline scores of the runs of `subspace_plan`: key, task, kind, k, seed, score.

    `kind` is that of the run's basis; `"head alone"` (`HeadOnly`, k = 0) and `"unshared"` (`Hadamard(norm=None)`, k =
    its parameters) are what it is measured between. Other runs are left out. Where runs of one task, kind and k have
    several protocols (rates that were tried), those with most seeds count, among equals the best mean score on the
    held-out rows. Raises `DataError` where one of the three is missing.
    """
    rows = []
    for key in store.load()["key"].unique():
        record = store.record(key)
        spec, headline = RunSpec.from_dict(record["spec"]), record["headline"]
        adapter, basis = spec.adapter, record.get("train_info", {}).get("basis", {})
        kind = {Hadamard(norm=None): UNSHARED, HeadOnly(): HEAD}.get(adapter, basis.get("kind"))
        if kind is None or spec.sparsity is not None:
            continue
        k = adapter.k if isinstance(adapter, Subspace) else record["counts"]["adapter"]["trained"]
        # A correlation with one answer for all rows is not defined, and recorded as null.
        score, held_out = (
            record["metrics"].get(part, {}).get(headline) or 0.0 for part in (split, "validation")
        )
        rows.append((key, spec.task, kind, k, spec.seed, score, spec.protocol, held_out))
    table = pd.DataFrame(rows, columns=["key", "task", "kind", "k", "seed", "score", "protocol", "held_out"])
    for kinds in ([HEAD], [UNSHARED], KINDS):
        if not table["kind"].isin(kinds).any():
            raise DataError(f"{store!r} has no runs of the kind {' or '.join(map(repr, kinds))}")
    picked = most_seeds(table, ["task", "kind", "k"]).drop(columns=["protocol", "held_out"])
    return picked.sort_values(["task", "kind", "k", "seed"], ignore_index=True)


def gap_table(scores: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Per task, what the adapter brings beyond the head, and whether that is more than the noise of seeds.

    `scores` is `coefficient_scores`; the seeds that have both runs count. Columns: `task`, `head`, `unshared` (means),
    `gap`, `noise` (the least gap that a one-sided t test at `level` tells from zero; the variance of the differences
    between seeds is pooled over tasks), `learned` (gap above noise), `n` (seeds).
    """
    wide = _by_seed(scores)
    gaps = (wide[UNSHARED] - wide[HEAD]).groupby("task")
    freedom = int((gaps.size() - 1).sum())
    if freedom < 1:
        raise DataError(
            "scores has one seed per task with both head and adapter; two are needed to know the noise"
        )
    variance = float(((gaps.size() - 1) * gaps.var().fillna(0)).sum()) / freedom
    table = wide.groupby("task").mean().rename(columns={HEAD: "head", UNSHARED: "unshared"})
    table["gap"] = gaps.mean()
    table["noise"] = stats.t.ppf(level, freedom) * np.sqrt(variance / gaps.size())
    return table.assign(learned=table["gap"] > table["noise"], n=gaps.size()).reset_index()


def numbers_needed(
    scores: pd.DataFrame, *, of: str = "gap", margin: float = 0.98, level: float = 0.95
) -> pd.DataFrame:
    """For each kind of basis and k, the share of the adapter's gain that k coefficients bring, mean over tasks.

    `scores` is `coefficient_scores`. With s, h and u the means over the common seeds of a task (with k coefficients,
    head alone, unshared), the share is (s − h) / (u − h) with `of="gap"` and s / u with `of="score"`. Tasks where u is
    not above h by more than noise (`gap_table`) are left out. Intervals are t over the shares of tasks.

    A k is `"enough"` where the one-sided bound of its share is at least `margin`, for it and every larger k of its kind
    (a fixed sequence from the largest down, which needs no correction); `"too few"` where the upper one is below;
    otherwise it `"cannot be told"`. `power` is the probability of `"enough"`, taken alone, if the true share is 1 and
    shares spread as they do here.

    One row per kind and k. Columns: `kind`, `k`, `share`, `low`, `high` (two-sided, `level`), `bound` and `upper`
    (one-sided), `power`, `verdict`, `n` (tasks), `left_out`, `margin`, `of`.

    Generalises to: other tasks like these with the same backbone. Bases of two tasks share most of their sources, and
    the gap that selects a task is also its denominator, so intervals are approximate.

    Simulated: 20 tasks, 3 seeds. A share that is the margin passes in at most 0.05; three planted directions bend the
    curve at k = 3; directions that bring nothing are never enough. `pytest tests/studies/test_how_many.py`
    """
    check_choice("of", of, MEASURES)
    check_range("margin", margin, above=0)
    check_range("level", level, above=0.5, below=1)
    tasks = gap_table(scores, level=level).set_index("task")
    learned = tasks.index[tasks["learned"]]
    ends = _by_seed(scores).loc[learned]
    rows = []
    for (kind, k), part in scores[scores["kind"] != UNSHARED].groupby(["kind", "k"]):
        # Of each task the seeds that have all three.
        means = ends.assign(score=part.set_index(["task", "seed"])["score"]).dropna().groupby("task").mean()
        if means.empty:
            continue
        floor = means[HEAD] if of == "gap" else 0
        shares = ((means["score"] - floor) / (means[UNSHARED] - floor)).to_numpy()
        mean, low, high = t_interval(shares, level=level)
        _, bound, upper = t_interval(shares, level=2 * level - 1)
        rows.append(
            {
                "kind": kind,
                "k": k,
                "share": mean,
                "low": low,
                "high": high,
                "bound": bound,
                "upper": upper,
                "power": power_of(shares, 1 - margin, alpha=1 - level),
                "n": len(shares),
                "left_out": int((~tasks["learned"]).sum()),
                "margin": margin,
                "of": of,
            }
        )
    if not rows:
        raise DataError("scores has no task where the adapter brings more than the head by more than noise")
    table = pd.DataFrame(rows)
    order = {kind: place for place, kind in enumerate((HEAD, *KINDS))}
    table = table.sort_values(
        ["kind", "k"], key=lambda column: column.map(order) if column.name == "kind" else column
    )
    holds = (table["bound"] >= margin)[::-1].groupby(table["kind"]).cummin()
    verdict = np.select([holds.reindex(table.index), table["upper"] < margin], [ENOUGH, TOO_FEW], OPEN)
    return table.assign(verdict=verdict).reset_index(drop=True)


def numbers_text(table: pd.DataFrame, kind: str = "other tasks") -> str:
    """The answer of `numbers_needed` for one kind in a sentence: the least k that is enough, or that none is."""
    check_choice("kind", kind, list(table["kind"].unique()))
    rows = table[table["kind"] == kind]
    enough = rows[rows["verdict"] == ENOUGH]
    last = (enough if len(enough) else rows.iloc[::-1]).iloc[0]
    what = "gain" if last["of"] == "gap" else "score"
    facts = (
        f"k = {last['k']} keeps {100 * last['share']:.0f} % of the {what} [{100 * last['low']:.0f}, "
        f"{100 * last['high']:.0f}], with a one-sided bound of {100 * last['bound']:.0f} %, over {last['n']} tasks "
        f"({last['left_out']} left out); power at a true share of 1: {last['power']:.2f}"
    )
    goal = f"{100 * last['margin']:.0f} % of the {what}"
    if len(enough):
        return f"{last['k']} numbers per task are enough for {goal}: {facts}"
    return f"no k up to {last['k']} is shown to be enough for {goal} ({last['verdict']}): {facts}"


def _by_seed(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of the head alone and of the unshared adapter [task and seed, kind], where both are there."""
    require_columns("scores", scores, "task", "kind", "k", "seed", "score")
    if scores.duplicated(["task", "kind", "k", "seed"]).any():
        raise DataError("scores has more than one row for one task, kind, k and seed")
    both = scores[scores["kind"].isin([HEAD, UNSHARED])]
    wide = both.pivot(index=["task", "seed"], columns="kind", values="score").dropna()
    if wide.empty or wide.shape[1] < 2:
        raise DataError("scores has no task and seed with both the head alone and the unshared adapter")
    return wide
