"""Every test keeps its level and every interval its coverage, on synthetic studies with fixed seeds."""

from __future__ import annotations

import pytest

from tests.studies.simulated import coverage_of_mean_over, size_with_nested_rows

NOMINAL = 0.07  # the most that may be false where 0.05 is nominal


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
