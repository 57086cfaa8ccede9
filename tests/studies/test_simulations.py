"""Every test keeps its level and every interval its coverage, on synthetic studies with fixed seeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hadamard_toolkit import studies
from tests.studies.simulated import (
    agreement_claims,
    chance_claims,
    coverage_of_components,
    coverage_of_mean_over,
    sharing_claims,
    size_with_nested_rows,
    within_margin_claims,
)

NOMINAL = 0.07  # the most that may be false where 0.05 is nominal
PLANTED = 0.035  # what the better four of six layers score above the mean four, in all tasks


@pytest.mark.parametrize(("tasks", "seeds"), [(8, 3), (5, 3), (3, 1)])
def test_a_mean_over_tasks_is_covered_with_few_tasks(tasks: int, seeds: int) -> None:
    assert coverage_of_mean_over(1000, tasks, seeds) >= 0.93


def test_a_percentile_bootstrap_over_tasks_is_too_narrow() -> None:
    """Why `mean_over` is none: the same tables."""
    assert coverage_of_mean_over(300, 5, bootstrap=True) < 0.9


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_nested_rows_are_tested_over_seeds(correlation: float) -> None:
    assert size_with_nested_rows(1000, correlation) <= NOMINAL
    assert size_with_nested_rows(1000, correlation, pooled=True) > 0.08, (
        "what pairs of K and seed would claim"
    )


def test_an_effect_is_covered_over_what_its_interval_generalises_to() -> None:
    """Three seeds of three tasks that differ: other seeds and other tasks are two questions."""
    assert coverage_of_components(400, "seed") >= 0.93
    assert coverage_of_components(400, "task", truth="others") >= 0.93
    assert coverage_of_components(100, "task", truth="others", tasks=8) >= 0.93
    assert coverage_of_components(100, "seed", truth="others") < 0.9, "nothing is known of other tasks"


def test_sharing_that_costs_the_margin_seldom_passes_and_sharing_that_costs_nothing_does() -> None:
    at_margin = sharing_claims(100, 0.98)
    assert at_margin["covered"] >= 0.93
    assert max(at_margin["p"], at_margin["any"]) <= NOMINAL
    assert sharing_claims(20, 1.0)["any"] >= 0.8


def test_orders_that_are_made_of_each_other_are_never_found_in_agreement() -> None:
    """In noise, leave-one-out orders agree with W of about 0.8; orders of one task each do not."""
    assert agreement_claims(40, "consensus") == 0
    assert agreement_claims(120, "greedy") <= NOMINAL
    assert agreement_claims(20, "greedy", shared=PLANTED) >= 0.8


@pytest.mark.parametrize(("rule", "shared"), [("greedy", 0.0), ("norm", PLANTED)])
def test_a_rule_that_knows_nothing_is_not_better_than_chance(rule: str, shared: float) -> None:
    """Greedy on noise; and orders drawn task by task where layers do differ."""
    claims = chance_claims(150, rule=rule, shared=shared)
    assert claims["size"] <= NOMINAL
    assert claims["tasks"] <= NOMINAL
    assert claims["relabelling"] <= NOMINAL


def test_an_order_that_all_tasks_share_is_found_over_tasks() -> None:
    """One relabelling for all tasks cannot see it."""
    for rule in ("greedy", "consensus"):
        assert chance_claims(20, rule=rule, shared=PLANTED)["tasks"] >= 0.8
    assert chance_claims(20, rule="consensus", shared=PLANTED)["relabelling"] <= 0.2


@pytest.mark.parametrize("rows", [100, 300])
def test_a_step_that_costs_the_margin_seldom_passes(rows: int) -> None:
    claims = within_margin_claims(80, rows=rows, cost=0.02)
    assert claims["passed"] <= 0.10
    assert claims["confirmed"] <= NOMINAL
    assert within_margin_claims(30, rows=rows, cost=0.02, same_rows=True)["passed"] > 0.3


def test_layers_that_cost_nothing_are_let_go() -> None:
    assert within_margin_claims(30, rows=300, cost=0.1, free=2, margin=0.04)["confirmed"] >= 0.8


def table_of_studies() -> dict[str, list[str]]:
    """The rows of docs/statistics.md by study."""
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]
    return {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_every_public_study_is_in_the_table_of_statistics() -> None:
    assert set(table_of_studies()) == set(studies.__all__)


@pytest.mark.parametrize(
    "name", [name for name, row in table_of_studies().items() if len(row) == 5 and row[4]]
)
def test_what_was_simulated_is_in_the_docstring_with_its_command(name: str) -> None:
    told = " ".join((getattr(studies, name).__doc__ or "").split())
    assert "Simulated: " in told
    assert "`pytest " in told.split("Simulated: ")[1]
