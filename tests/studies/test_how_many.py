"""Synthetic scores whose truth is known: where the curve bends, what is enough, and what is never claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies import gap_table, numbers_needed, numbers_text
from hadamard_toolkit.studies.how_many import HEAD, UNSHARED

KS = (1, 2, 3, 4, 8)


def scores_of(
    share: Callable[[int], float],
    *,
    tasks: int = 20,
    seeds: int = 3,
    noise: float = 0.01,
    spread: float = 0.0,
    seed: int = 0,
    flat: int = 0,
    ks: Sequence[int] = KS,
) -> pd.DataFrame:
    """`share(k)` of the gap of each task, which differs by `spread` between tasks; `flat` further tasks have no gap."""
    generator = np.random.default_rng(seed)
    rows = []
    for task in range(tasks + flat):
        head, gap = generator.uniform(0.5, 0.7), generator.uniform(0.1, 0.25) * (task < tasks)
        truth = {(HEAD, 0): 0.0, (UNSHARED, 4608): 1.0}
        truth |= {("other tasks", k): share(k) + spread * generator.normal() for k in ks}
        for run in range(seeds):
            for (kind, k), part in truth.items():
                score = head + gap * part + noise * generator.normal()
                rows.append({"task": f"task {task}", "kind": kind, "k": k, "seed": run, "score": score})
    return pd.DataFrame(rows)


def curve(table: pd.DataFrame, kind: str = "other tasks") -> pd.DataFrame:
    return table[table["kind"] == kind].set_index("k")


def test_three_planted_directions_bend_the_curve_at_three() -> None:
    table = numbers_needed(scores_of(lambda k: min(k, 3) / 3, noise=0.002))
    found = curve(table)
    assert found["share"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1], abs=0.02)
    assert found["verdict"].tolist() == ["too few", "too few", "enough", "enough", "enough"]
    assert (found["n"] == 20).all()
    assert numbers_text(table).startswith(
        "3 numbers per task are enough for 98 % of the gain: k = 3 keeps 100 %"
    )
    head = curve(table, HEAD).loc[0]
    assert head["share"] == pytest.approx(0, abs=1e-12)


def test_directions_that_bring_nothing_are_never_enough() -> None:
    for seed in range(8):
        table = numbers_needed(scores_of(lambda k: 0.0, seed=seed))
        assert set(curve(table)["verdict"]) == {"too few"}
        assert abs(curve(table)["share"]).max() < 0.1
    assert "no k up to 8 is shown to be enough" in numbers_text(table)


def test_a_share_that_is_the_margin_passes_as_often_as_allowed() -> None:
    passed = []
    for seed in range(100):
        table = numbers_needed(
            scores_of(lambda k: 0.9, noise=0.005, spread=0.05, seed=seed, ks=(8,)), margin=0.9
        )
        passed.append(curve(table)["verdict"].iloc[-1] == "enough")
    assert np.mean(passed) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 100)


def test_the_power_is_how_often_a_true_share_of_one_is_shown() -> None:
    passed, promised = [], []
    for seed in range(100):
        table = numbers_needed(
            scores_of(lambda k: 1.0, noise=0.004, spread=0.05, seed=seed, ks=(8,)), margin=0.98
        )
        last = curve(table).iloc[-1]
        passed.append(last["bound"] >= 0.98)
        promised.append(last["power"])
    assert 0.2 < np.mean(passed) < 0.9
    assert np.mean(passed) == pytest.approx(np.mean(promised), abs=0.12)


def test_a_larger_k_that_fails_ends_the_claim() -> None:
    table = numbers_needed(scores_of(lambda k: 1.05 if k < 8 else 0.9, noise=0.002))
    assert "enough" not in set(curve(table)["verdict"])
    assert (curve(table)["bound"] >= 0.98).tolist() == [True] * 4 + [False]
    assert curve(table)["verdict"].tolist() == ["cannot be told"] * 4 + ["too few"]


def test_too_few_tasks_cannot_tell() -> None:
    table = numbers_needed(scores_of(lambda k: 1.0, tasks=3, spread=0.1, seed=1))
    assert set(curve(table)["verdict"]) == {"cannot be told"}
    assert curve(table)["power"].max() < 0.5


def test_tasks_without_a_gap_are_left_out_and_counted() -> None:
    scores = scores_of(lambda k: 1.0, flat=5, seed=3)
    gaps = gap_table(scores).set_index("task")
    assert gaps["learned"].sum() <= 21
    assert gaps.loc[[f"task {task}" for task in range(20)], "learned"].all()
    wide = scores.pivot(index=["task", "seed"], columns=["kind", "k"], values="score")
    differences = (wide[UNSHARED, 4608] - wide[HEAD, 0]).unstack("seed")
    pooled = differences.var(axis=1).mean()
    assert gaps["noise"].to_numpy() == pytest.approx(stats.t.ppf(0.95, 25 * 2) * np.sqrt(pooled / 3))
    table = numbers_needed(scores)
    assert (table["n"] + table["left_out"] == 25).all()
    assert (table["n"] == gaps["learned"].sum()).all()


def test_the_share_of_the_score_starts_at_the_head_and_not_at_zero() -> None:
    scores = scores_of(lambda k: 0.5, noise=0.0, flat=0)
    table = numbers_needed(scores, of="score")
    wide = scores.pivot_table(index="task", columns="kind", values="score")
    assert curve(table, HEAD)["share"].loc[0] == pytest.approx((wide[HEAD] / wide[UNSHARED]).mean())
    assert curve(table)["share"].iloc[0] == pytest.approx((wide["other tasks"] / wide[UNSHARED]).mean())
    assert curve(table)["of"].eq("score").all()


def test_what_cannot_be_asked_is_told() -> None:
    scores = scores_of(lambda k: 1.0, tasks=3)
    with pytest.raises(ArgumentError, match="of='loss'"):
        numbers_needed(scores, of="loss")
    with pytest.raises(DataError, match="more than one row"):
        gap_table(pd.concat([scores, scores]))
    with pytest.raises(DataError, match="both the head alone"):
        gap_table(scores[scores["kind"] != HEAD])
    with pytest.raises(DataError, match="two are needed"):
        gap_table(scores[scores["seed"] == 0])
    with pytest.raises(DataError, match="no task where the adapter brings more"):
        numbers_needed(scores.assign(score=scores["score"].where(scores["kind"] != UNSHARED, 0.1)))
    with pytest.raises(ArgumentError, match="kind='mine'"):
        numbers_text(numbers_needed(scores), "mine")
