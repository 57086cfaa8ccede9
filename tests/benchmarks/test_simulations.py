"""The long version of tests/studies/test_simulations.py: the rates that docstrings and docs/statistics.md quote.

pytest -m benchmark tests/benchmarks/test_simulations.py -s [-k mean_over]
"""

from __future__ import annotations

import pytest

from tests.studies.simulated import (
    agreement_claims,
    chance_claims,
    coverage_of_components,
    coverage_of_mean_over,
    sharing_claims,
    size_with_nested_rows,
    within_margin_claims,
)
from tests.studies.test_simulations import NOMINAL, PLANTED

pytestmark = pytest.mark.benchmark


def told(what: str, rate: float) -> float:
    print(f"\n{what}: {rate:.3f}")
    return rate


def test_mean_over() -> None:
    for tasks in (3, 5, 8):
        rate = told(f"mean_over covers, {tasks} tasks, normal", coverage_of_mean_over(5000, tasks))
        assert rate >= 0.93
        told(f"bootstrap covers, {tasks} tasks, normal", coverage_of_mean_over(2000, tasks, bootstrap=True))
    told("mean_over covers, 8 tasks, skewed", coverage_of_mean_over(5000, 8, effects="skewed"))


def test_nested_rows() -> None:
    for correlation in (0.3, 0.6):
        assert (
            told(f"over seeds, correlation {correlation}", size_with_nested_rows(5000, correlation)) <= 0.06
        )
        told(
            f"pairs pooled, correlation {correlation}", size_with_nested_rows(5000, correlation, pooled=True)
        )


def test_component_effects() -> None:
    for over, truth in (("seed", "these"), ("task", "others"), ("seed", "others")):
        rate = coverage_of_components(3000, over, truth=truth)
        told(f"component_effects over {over}, 3 tasks x 3 seeds, covers the effect on {truth}", rate)
        assert rate >= 0.93 or (over, truth) == ("seed", "others")


def test_sharing() -> None:
    for kept in (0.98, 1.0):
        for name, rate in sharing_claims(1000, kept).items():
            told(f"sharing_summary, share {kept}, {name}", rate)


def test_agreement() -> None:
    assert told("agreement of consensus orders in noise", agreement_claims(200, "consensus")) == 0
    for tasks in (3, 9):
        rate = told(
            f"agreement of greedy orders in noise, {tasks} tasks", agreement_claims(1000, "greedy", tasks)
        )
        assert rate <= NOMINAL
    shared = agreement_claims(200, "greedy", shared=PLANTED)
    assert told("agreement of greedy orders, one order planted", shared) >= 0.8


def test_chance() -> None:
    for rule, common in (("greedy", False), ("norm", False), ("norm", True)):
        claims = chance_claims(500, rule=rule, shared=PLANTED * (rule == "norm"), common=common)
        for name, rate in claims.items():
            told(f"better_than_chance, {rule} knows nothing, one order for all tasks: {common}, {name}", rate)
        assert common or max(claims.values()) <= NOMINAL
    for rule in ("greedy", "consensus"):
        for name, rate in chance_claims(200, rule=rule, shared=PLANTED).items():
            told(f"better_than_chance, {rule}, one order planted, {name}", rate)


def test_smallest() -> None:
    for rows in (100, 300):
        claims = within_margin_claims(500, rows=rows, cost=0.02)
        told(f"smallest_set passes at the margin, {rows} rows", claims["passed"])
        told(f"smallest_set confirms at the margin, {rows} rows", claims["confirmed"])
        assert claims["passed"] <= 0.10
        same = within_margin_claims(200, rows=rows, cost=0.02, same_rows=True)
        told(f"smallest_set passes at the margin, {rows} rows that chose the path", same["passed"])
    free = within_margin_claims(200, rows=300, cost=0.1, free=2, margin=0.04)
    told("smallest_set confirms, two layers of 5 cost nothing, margin 0.04, 300 rows", free["confirmed"])
