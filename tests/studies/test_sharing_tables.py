"""The sharing study as tables: costs and shares as text, and a smaller pool beside those who share with nobody."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hadamard_toolkit.studies import scheme_table, share_table, with_alone

SUMMARY = pd.DataFrame(
    {
        "percent": [0.04056, 0.00507],
        "score": [0.7821, 0.7508],
        **{"share": [1.0, 0.9604], "share_low": [1.0, 0.9121], "share_high": [1.0, 1.0223]},
        **{"gain_share": [1.0, 0.666], "gain_share_low": [1.0, np.nan], "gain_share_high": [1.0, np.nan]},
        "p_holm": [np.nan, 0.4321],
    },
    index=pd.Index(["own", "mean"], name="scheme"),
)


def test_shares_are_written_with_their_intervals_where_they_have_one() -> None:
    found = share_table(SUMMARY)
    assert found.loc["mean"].tolist() == ["0.0051", "0.751", "0.960 [0.912, 1.022]", "0.67 [none]", "0.432"]
    assert found.loc["own", "p_holm"] == ""
    assert list(found.columns) == ["percent", "score", "share", "gain", "p_holm"]


def test_a_scheme_is_told_once_with_its_sources_and_cost() -> None:
    row = {
        "scheme": "mean",
        "weight": "mean",
        "bias": "mean",
        "norm": "own",
        "parameters": 5184.0,
        "percent": 0.0228,
    }
    found = scheme_table(pd.DataFrame([row, {**row, "scheme": "own"}, row]))
    assert list(found.index) == ["mean", "own"]
    assert found.loc["mean"].tolist() == ["mean", "mean", "own", "5,184", "0.0228"]


def test_those_who_need_nobody_come_from_the_larger_pool() -> None:
    measured = pd.DataFrame(
        [("a", "own", 0.9), ("a", "bare", 0.5), ("a", "mean", 0.8), ("b", "own", 0.7)],
        columns=["key", "scheme", "score"],
    )
    alike = pd.DataFrame([("a", "mean", 0.85)], columns=["key", "scheme", "score"])
    assert with_alone(alike, measured).values.tolist() == [
        ["a", "mean", 0.85],
        ["a", "own", 0.9],
        ["a", "bare", 0.5],
    ]
