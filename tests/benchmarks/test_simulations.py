"""The long version of tests/studies/test_simulations.py: the rates that docstrings and docs/statistics.md quote.

pytest -m benchmark tests/benchmarks/test_simulations.py -s [-k mean_over]
"""

from __future__ import annotations

import pytest

from tests.studies.simulated import coverage_of_mean_over, size_with_nested_rows

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
