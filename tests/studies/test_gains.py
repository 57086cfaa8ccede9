from __future__ import annotations

import pandas as pd
import pytest
from scipy import stats

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies import gains


def scores(**columns: list[object]) -> pd.DataFrame:
    rows = [(task, seed) for task in ("a", "b", "c") for seed in (0, 1)]
    control = [0.50, 0.52, 0.60, 0.60, 0.70, 0.68]
    better = [0.55, 0.53, 0.61, 0.65, 0.70, 0.74]
    parts = [
        pd.DataFrame(rows, columns=["task", "seed"]).assign(method=method, score=values)
        for method, values in (("control", control), ("better", better))
    ]
    return pd.concat(parts, ignore_index=True).assign(**columns)


def test_gains_are_paired_and_their_interval_is_over_tasks() -> None:
    table = gains(scores(), {"over it": ("better", "control"), "under it": ("control", "better")})
    by_task = [0.03, 0.03, 0.03]
    assert list(table["comparison"]) == ["over it", "under it"]
    assert table["mean"].tolist() == pytest.approx([0.03, -0.03])
    assert table["n"].tolist() == [3, 3]
    assert table["averaged"].tolist() == [6, 6]
    assert table["low"].iloc[0] == pytest.approx(min(by_task)), "tasks agree, so there is no spread"


def test_gains_over_seeds_and_within_groups() -> None:
    seeds = gains(scores(), {"x": ("better", "control")}, over="seed").iloc[0]
    means = [0.06 / 3, 0.12 / 3]  # of seed 0 and of seed 1
    half = stats.t.ppf(0.975, 1) * pd.Series(means).std() / 2**0.5
    assert (seeds["mean"], seeds["low"], seeds["n"]) == (
        pytest.approx(0.03),
        pytest.approx(0.03 - half),
        2,
    )
    apart = gains(scores(), {"x": ("better", "control")}, over="seed", by="task", level=0.5)
    assert list(apart["task"]) == ["a", "b", "c"]
    assert apart["mean"].tolist() == pytest.approx([0.03, 0.03, 0.03])
    assert set(apart["level"]) == {0.5}


def test_a_run_without_a_partner_is_left_out() -> None:
    table = scores().drop(index=[0, 6 + 3])  # the control's first, the better one's fourth
    row = gains(table, {"x": ("better", "control")}).iloc[0]
    assert row["averaged"] == 4
    assert row["mean"] == pytest.approx((0.01 + 0.01 + 0.03) / 3)
    none = gains(scores(), {"absent": ("better", "no such method"), "x": ("better", "control")})
    assert list(none["comparison"]) == ["x"]
    assert gains(scores(), {"absent": ("better", "no such method")}, by="seed").empty


def test_other_columns_may_be_compared_and_paired() -> None:
    table = scores().rename(columns={"method": "scorer", "task": "rows"})
    found = gains(table, {"x": ("better", "control")}, column="scorer", on=("rows", "seed"), over="rows")
    assert found["n"].tolist() == [3]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match=r"more than one row for \{'task': '.*'\}; one row per run"):
        gains(pd.concat([scores(), scores()]), {"x": ("better", "control")})
    mixed = scores(metric=["accuracy", "accuracy", "spearman", "spearman", "accuracy", "accuracy"] * 2)
    with pytest.raises(DataError, match="no common unit"):
        gains(mixed, {"x": ("better", "control")})
    apart = gains(mixed, {"x": ("better", "control")}, on=("task", "seed", "metric"), by="metric")
    assert dict(zip(apart["metric"], apart["n"], strict=True)) == {"accuracy": 2, "spearman": 1}


def test_readings_of_the_same_runs_stand_side_by_side() -> None:
    rows = scores()
    table = gains({"all": rows, "without a": rows[rows["task"] != "a"]}, {"x": ("better", "control")})
    assert list(table.columns[:2]) == ["reading", "comparison"]
    assert table.set_index("reading")["n"].to_dict() == {"all": 3, "without a": 2}
    whole = gains(rows, {"x": ("better", "control")})
    pd.testing.assert_frame_equal(table.iloc[[0]].drop(columns="reading"), whole)
