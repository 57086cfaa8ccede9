"""What a Task promises, and how it refuses rows that break the promise."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.tasks.base import Task, in_memory


def _splits(**changes: Any) -> DatasetDict:
    columns = {"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0], **changes}
    good = {"text": ["e", "f"], "label": [0, 1]}
    return DatasetDict(train=in_memory(columns), test=in_memory(good))


def _task(splits: DatasetDict | None = None, **changes: Any) -> Task:
    fields = {
        "text_columns": ("text",),
        "kind": "classification",
        "labels": ("no", "yes"),
        "metric": "accuracy",
    }
    return Task("mine", _splits() if splits is None else splits, **{**fields, **changes})


def test_own_data_become_a_task() -> None:
    task = _task(text_columns=["text"], labels=["no", "yes"])
    assert (task.head, task.n_labels, task.metrics, task.text_columns) == (
        "classification",
        2,
        ("accuracy",),
        ("text",),
    )
    splits = _splits(label=[0.5, 1, 2, 3])
    splits["test"] = in_memory({"text": ["x"], "label": [1.0]})
    rated = _task(splits, kind="regression", labels=(), metric="pearson", metrics=("spearman", "pearson"))
    assert (rated.head, rated.n_labels) == ("regression", 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0, 1, 2, 0]},
            "task 'mine', split 'train': column 'label' has 2 in row 2; allowed are 0 to 1",
        ),
        ({"label": [0, -1, 1, 0]}, "column 'label' has -1 in row 1; allowed are 0 to 1"),
        ({"label": [0, None, 1, 0]}, "column 'label' has no value in row 1"),
        ({"label": [0.0, 1.0, 1.0, 0.0]}, "column 'label' holds float; classification needs whole numbers"),
        (
            {"label": ["no", "yes", "no", "no"]},
            "column 'label' holds string; classification needs whole numbers",
        ),
        ({"text": ["a", "b", None, "d"]}, "column 'text' has no text in row 2"),
        ({"text": [1, 2, 3, 4]}, "column 'text' holds int64, not strings"),
    ],
)
def test_rows_that_do_not_fit_name_split_column_and_value(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _task(_splits(**columns))


def test_a_regression_needs_finite_floats() -> None:
    for label, message in (
        (
            [0.5, float("nan"), 1, 2],
            "split 'train': column 'label' has nan in row 1; allowed are finite numbers",
        ),
        ([0, 1, 2, 3], "holds int64; regression needs floats"),
    ):
        with pytest.raises(DataError, match=message):
            _task(_splits(label=label), kind="regression", labels=())


def test_missing_columns_and_rows() -> None:
    with pytest.raises(DataError, match="split 'train' has no column 'sentence'; it has 'text', 'label'"):
        _task(text_columns=("sentence",))
    with pytest.raises(DataError, match="split 'train' has no rows"):
        _task(_splits(text=pa.array([], pa.string()), label=pa.array([], pa.int64())))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"splits": DatasetDict(train=Dataset.from_dict({"text": ["a"]}))},
            r"splits=\['train'\] is not allowed",
        ),
        ({"splits": [1]}, "splits='list' is not allowed"),
        ({"kind": "generation"}, "kind='generation' is not allowed"),
        ({"text_columns": ("a", "b", "c")}, "name one or two columns"),
        ({"labels": ("only",)}, "two or more different names"),
        ({"labels": ("no", "no")}, "two or more different names"),
        ({"kind": "regression"}, r"labels=\('no', 'yes'\) is not allowed"),
        ({"metrics": ("f1",)}, "metric='accuracy' is not allowed; choose one of 'f1'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _task(**fields)


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_a_limit_draws_training_rows_by_its_seed(limit: int, seed: int) -> None:
    rows = {"text": [f"t{i}" for i in range(9)], "label": [i % 2 for i in range(9)]}
    task = _task(DatasetDict(train=in_memory(rows), test=in_memory(rows)))
    limited, again = task.limited(limit, seed), task.limited(limit, seed)
    drawn = limited.splits["train"]["text"][:]
    assert drawn == again.splits["train"]["text"][:]
    assert len(drawn) == len(set(drawn)) == min(limit, 9)
    assert all(
        label == int(text[1:]) % 2
        for text, label in zip(drawn, limited.splits["train"]["label"], strict=True)
    )
    assert limited.splits["test"]["text"][:] == rows["text"]
    assert limited.provenance["rows"] == {"train": min(limit, 9), "test": 9}
    assert (limited.provenance["limit"], limited.provenance["limit_seed"]) == ({"train": limit}, seed)


def test_limits_by_split_and_different_seeds() -> None:
    rows = {"text": [f"t{i}" for i in range(50)], "label": [i % 2 for i in range(50)]}
    task = _task(DatasetDict(train=in_memory(rows), test=in_memory(rows)))
    limited = task.limited({"train": 10, "test": 5}, seed=1)
    assert {split: data.num_rows for split, data in limited.splits.items()} == {"train": 10, "test": 5}
    assert limited.splits["train"]["text"][:] != task.limited(10, seed=2).splits["train"]["text"][:]
    assert task.limited(None) is task


@pytest.mark.parametrize("limit", [0, -3, 1.5, True, {"train": 0}, {"nowhere": 3}])
def test_bad_limits(limit: Any) -> None:
    with pytest.raises(ArgumentError, match="limit"):
        _task().limited(limit)
