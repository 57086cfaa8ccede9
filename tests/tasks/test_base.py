"""What a Task promises, and how it refuses rows that break the promise."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
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
            _task(_splits(label=label), kind="regression", labels=(), metric="pearson")


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
        ({"kind": "regression", "metric": "pearson"}, r"labels=\('no', 'yes'\) is not allowed"),
        ({"labels": "no"}, r"labels=\('no',\) is not allowed"),
        (
            {"kind": "span", "labels": (), "metric": "f1", "text_columns": ("context", "question")},
            r"a span task has \('question', 'context'\)",
        ),
        ({"metrics": ("f1",)}, "metric='accuracy' is not allowed; choose one of 'f1'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _task(**fields)


def test_one_name_alone_is_not_read_by_letters() -> None:
    task = _task(text_columns="text", metrics="accuracy")
    assert (task.text_columns, task.metrics) == (("text",), ("accuracy",))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dev", "Did you mean 'validation'?"),
        ("val", "Did you mean 'validation'?"),
        ("eval", "Did you mean 'validation'?"),
        ("validation_matched", "Did you mean 'validation'?"),
        ("Train", "Did you mean 'train'?"),
        ("unsupervised", "leave it out"),
    ],
)
def test_a_split_that_nothing_would_read_is_refused(name: str, hint: str) -> None:
    splits = _splits()
    splits[name] = splits["test"]
    with pytest.raises(ArgumentError) as refused:
        _task(splits)
    assert f"splits=['train', 'test', {name!r}] is not allowed: nothing would read {name!r}" in str(
        refused.value
    )
    assert hint in str(refused.value)


@pytest.mark.parametrize("name", ["validation", "test_mismatched", "test-2", "testing"])
def test_splits_to_select_and_to_test_on_are_kept(name: str) -> None:
    splits = _splits()
    splits[name] = splits["test"]
    assert list(_task(splits).splits) == ["train", "test", name]


def test_a_data_frame_is_read_without_its_index() -> None:
    rows = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 1]}, index=[7, 8, 9])
    task = _task({"train": rows[rows.label == 1], "test": rows})  # type: ignore[arg-type]
    assert isinstance(task.splits, DatasetDict)
    assert task.splits["train"].to_dict() == {"text": ["b", "c"], "label": [1, 1]}
    rated = rows.assign(label=[0.5, 1, 2])
    task = _task(
        {"train": rated, "test": rated},  # type: ignore[arg-type]
        kind="regression",
        labels=(),
        metric="pearson",
    )
    assert task.splits["test"].features["label"].dtype == "float32"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            pd.DataFrame({"text": ["a", None], "label": [0, 1]}),
            "split 'train': column 'text' has no text in row 1",
        ),
        (
            pd.DataFrame({"text": ["a", "b"], "label": [0, None]}),
            "column 'label' has no value in row 1",
        ),
        (
            pd.DataFrame({"text": ["a", 1], "label": [0, 1]}, dtype=object),
            "split 'train' cannot be read from its DataFrame: .*text",
        ),
        (_splits()["test"].to_iterable_dataset(), "split 'train' streams its rows"),
        (
            {"text": ["a"], "label": [0]},
            "split 'train' is a dict; give a datasets.Dataset or a pandas DataFrame",
        ),
    ],
)
def test_rows_of_another_kind_are_refused_or_checked(train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _task({"train": train, "test": _splits()["test"]})  # type: ignore[arg-type]


def test_the_format_of_a_data_set_is_left_aside_and_a_transform_refused() -> None:
    splits = _splits()
    splits.set_format("torch", columns=["label"])
    task = _task(splits)
    assert task.splits["train"][0] == {"text": "a", "label": 0}
    assert type(task.splits["train"]["label"][0]) is int
    assert splits["train"].format["type"] == "torch"  # the user's own is as it was
    splits.set_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    with pytest.raises(DataError, match="split 'train' has a transform"):
        _task(splits)


def test_label_names_in_another_order_than_the_data_are_refused() -> None:
    splits = _splits().cast_column("label", ClassLabel(names=["yes", "no"]))
    with pytest.raises(
        DataError, match=r"'label' numbers \['yes', 'no'\], but the task has .*\('no', 'yes'\)"
    ):
        _task(splits)
    assert _task(splits, labels=("yes", "no")).splits["train"]["label"][:] == [0, 1, 1, 0]
    assert _task(splits, labels=("nein", "ja")).labels == ("nein", "ja")  # other names are the user's choice


def _span(answers: list[Any]) -> Task:
    rows = in_memory({"question": ["who"], "context": ["a man"], "answers": answers})
    return _task(DatasetDict(train=rows, test=rows), text_columns=("question", "context"), kind="span",
                 labels=(), metric="f1")  # fmt: skip


def test_the_answers_of_a_span_task_are_checked() -> None:
    assert _span([{"text": ["man"], "answer_start": [2]}]).n_labels == 2
    with pytest.raises(DataError, match="split 'train': row 0 has the answer 'man', which is not in its"):
        _span([{"text": ["man"], "answer_start": [1]}])
    with pytest.raises(DataError, match="a span task needs a column 'answers'"):
        _span(["man"])


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
