from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.studies import (
    as_text,
    in_order,
    interval_table,
    interval_text,
    intervals,
    listed,
    mean_sd,
    mean_sd_table,
    short_names,
)

SCORES = pd.DataFrame(
    {
        "task": ["b", "b", "b", "a"],
        "method": ["Hadamard", "HeadOnly", "Hadamard", "Hadamard"],
        "score": [0.5, 0.25, 0.7, 0.125],
    }
)


def test_short_names_in_columns_index_and_labels() -> None:
    table = pd.DataFrame({"task": ["embedded/tweets", "sst2"], "note": ["embedded/tweets", "x"]})
    shown = short_names(table)
    assert list(shown["task"]) == ["tweets", "sst2"]
    assert list(shown["note"]) == ["embedded/tweets", "x"], "no column of tasks"
    assert shown["task"].dtype == table["task"].dtype
    assert list(table["task"]) == ["embedded/tweets", "sst2"], "the table itself is left as it is"
    pairs = short_names(
        pd.DataFrame({"task_a": ["embedded/a"], "task_b": ["b"], "source_task": ["embedded/c"]})
    )
    assert pairs.iloc[0].tolist() == ["a", "b", "c"]
    matrix = pd.DataFrame([[1.0, 2.0]], index=["embedded/a"], columns=["embedded/a", 0])
    assert list(short_names(matrix).index) == ["a"]
    assert list(short_names(matrix).columns) == ["a", 0]


def test_two_tasks_never_get_one_name() -> None:
    table = pd.DataFrame({"task_a": ["embedded/a", "embedded/b"], "task_b": ["a", "c"]})
    assert list(short_names(table)["task_a"]) == ["embedded/a", "b"]


def test_rows_in_the_order_asked_for() -> None:
    table = in_order(SCORES, "method", ["HeadOnly", "Hadamard", "LoRA"])
    assert list(table.index) == [1, 0, 2, 3]
    assert list(in_order(SCORES, "task", ["a"]).index) == [3], "others are left out"


def test_mean_and_standard_deviation_in_words() -> None:
    cells = mean_sd(SCORES, ["task", "method"])
    assert cells.to_dict() == {
        ("b", "Hadamard"): "0.600 ± 0.141 (2)",
        ("b", "HeadOnly"): "0.250 (1)",
        ("a", "Hadamard"): "0.125 (1)",
    }
    assert list(mean_sd(SCORES, "method", digits=1, times=100)) == ["44.2 ± 29.2 (3)", "25.0 (1)"]
    failed = SCORES.assign(failed=[True, False, True, False])
    assert list(mean_sd(failed, "task")) == ["0.483 ± 0.225 (3) †2", "0.125 (1)"]


def test_the_table_of_means_keeps_the_order_and_says_what_was_not_run() -> None:
    table = mean_sd_table(SCORES, "task", "method", digits=2)
    assert list(table.index) == ["b", "a"]
    assert list(table.columns) == ["Hadamard", "HeadOnly"]
    assert table.loc["a"].tolist() == ["0.12 (1)", "not run"]
    by_two = mean_sd_table(SCORES.assign(n=8), ["task", "n"], "method", absent="–")
    assert by_two.loc[("a", 8), "HeadOnly"] == "–"


@pytest.mark.parametrize(
    ("numbers", "options", "text"),
    [
        ((0.011, 0.001, 0.021), {"times": 100}, "+1.1 [+0.1, +2.1]"),
        ((-0.5, -1.25, 0.0), {"digits": 2}, "-0.50 [-1.25, +0.00]"),
        ((3.0,), {}, "+3.0"),
        ((3.0, np.nan, np.nan), {}, "+3.0"),
        ((3.0, 1.0, np.nan), {}, "+3.0"),
    ],
)
def test_an_estimate_with_its_interval(
    numbers: tuple[float, ...], options: dict[str, float], text: str
) -> None:
    assert interval_text(*numbers, **options) == text  # type: ignore[arg-type]


def test_intervals_of_a_table() -> None:
    table = pd.DataFrame(
        {"mean": [0.01, 0.02], "low": [0.0, np.nan], "high": [0.02, np.nan]}, index=["one", "two"]
    )
    assert intervals(table, times=100).to_dict() == {"one": "+1.0 [+0.0, +2.0]", "two": "+2.0"}
    assert list(intervals(table.rename(columns={"mean": "gain"}), "gain", digits=2)) == [
        "+0.01 [+0.00, +0.02]",
        "+0.02",
    ]


def test_a_table_of_intervals_keeps_the_order_and_says_how_many() -> None:
    table = pd.DataFrame(
        {
            "reading": ["z", "z", "a"],
            "comparison": ["y", "b", "y"],
            "mean": [0.01, 0.02, 0.03],
            "low": [0.0, np.nan, 0.02],
            "high": [0.02, np.nan, 0.04],
            "n": [7, 1, 5],
        }
    )
    shown = interval_table(table, "reading", "comparison", times=100)
    assert (list(shown.index), list(shown.columns)) == (["z", "a"], ["y", "b"])
    assert shown.loc["z"].tolist() == ["+1.0 [+0.0, +2.0] (7)", "+2.0 (1)"]
    assert shown.loc["a"].tolist() == ["+3.0 [+2.0, +4.0] (5)", "–"]
    assert interval_table(table.drop(columns="n"), "reading", "comparison", digits=2).iloc[0, 1] == "+0.02"


def test_a_list_in_a_sentence() -> None:
    assert [listed("a"), listed("ab"), listed("abc"), listed([]), listed([], "no task")] == [
        "a",
        "a and b",
        "a, b and c",
        "none",
        "no task",
    ]


def test_numbers_of_a_table_as_they_are_read() -> None:
    table = pd.DataFrame(
        {"trained": [36864, 7], "share": [0.0336711, np.nan], "fits": [True, False], "name": ["a", "b"]},
        index=pd.Index(["x", "y"], name="method"),
    )
    shown = as_text(table, digits=4)
    assert shown.loc["x"].tolist() == ["36,864", "0.0337", True, "a"]
    assert shown.loc["y"].tolist() == ["7", "", False, "b"]
    assert shown.index.name == "method"
    assert as_text(pd.DataFrame({"big": [1234.5]}), digits=0)["big"].tolist() == ["1,234"]
