"""What a task is, and the checks that every split of every task passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_whole, suggestion
from hadamard_toolkit.tasks.metrics import BY_KIND, check_metric

KINDS = tuple(BY_KIND)
SPAN_COLUMNS = ("question", "context")
_SYNONYMS = ("dev", "val", "valid", "eval", "development", "evaluation")  # of "validation"


@dataclass(frozen=True, eq=False)
class Task:
    """A data set ready to train and test on.

    Every split has the `text_columns` (one or two, strings without gaps) and a column `label`: whole numbers that index
    `labels` for `classification`, finite floats for `regression`. A `span` task has the text columns `question` and
    `context`, and `answers` in place of `label`. `metrics` are all that is reported, `metric` is the headline one
    among them (alone if `metrics` is left out); `tasks.metrics` says which fit which kind.

    The splits are `train` and `test`, `validation` only where the source holds rows out itself, and further test
    splits, whose names begin with `test`. Each is a `datasets.Dataset`, whose own format is left aside, or a pandas
    DataFrame, whose index is.

    Your own data become a task with `Task("mine", DatasetDict(train=…, test=…), ("text",), "classification",
    ("no", "yes"), "accuracy")`. Raises `ArgumentError` for a bad field and `DataError` for rows that break the promise.
    """

    name: str
    splits: DatasetDict
    text_columns: tuple[str, ...]
    kind: str
    labels: tuple[str, ...]
    metric: str
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        object.__setattr__(self, "text_columns", _names(self.text_columns))
        object.__setattr__(self, "metrics", _names(self.metrics) or (self.metric,))
        # A text is no tuple of its letters.
        object.__setattr__(self, "labels", _names(self.labels) if self.labels else ())
        self._check_fields()
        _check_split_names(self.splits)
        splits = DatasetDict(
            {
                split: _plain_rows(rows, f"task {self.name!r}, split {split!r}")
                for split, rows in self.splits.items()
            }
        )
        object.__setattr__(self, "splits", splits)
        for split, rows in splits.items():
            where = f"task {self.name!r}, split {split!r}"
            check_rows(rows, self.text_columns, self.kind, len(self.labels), where)
            _check_label_names(rows, self.labels, where)

    def _check_fields(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise ArgumentError(f"text_columns={self.text_columns!r} is not allowed; name one or two columns")
        if self.kind == "span" and self.text_columns != SPAN_COLUMNS:
            raise ArgumentError(
                f"text_columns={self.text_columns!r} is not allowed; a span task has {SPAN_COLUMNS!r}"
            )
        if self.kind == "classification" and (
            len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)
        ):
            raise ArgumentError(
                f"labels={self.labels!r} is not allowed; a classification has two or more different names"
            )
        if self.kind != "classification" and self.labels:
            raise ArgumentError(
                f"labels={self.labels!r} is not allowed; kind={self.kind!r} has none: give ()"
            )
        for metric in (self.metric, *self.metrics):
            check_metric(metric, self.kind, len(self.labels))
        check_choice("metric", self.metric, self.metrics)

    @property
    def head(self) -> str:
        """The `head` of `load_backbone` that fits."""
        return self.kind

    @property
    def n_labels(self) -> int:
        """Outputs of the head: the number of labels, 1 for a regression, 2 for a span."""
        return {"regression": 1, "span": 2}.get(self.kind, len(self.labels))

    def content(self) -> dict[str, str]:
        """SHA-256 of the texts and answers of each split: what a record needs to tell data of one name apart.

        The same rows in the same order give the same, whatever file they are in.
        """
        columns = (*self.text_columns, "answers" if self.kind == "span" else "label")
        found = {}
        for split, rows in self.splits.items():
            table, digest = rows.with_format("arrow")[:], hashlib.sha256()
            for column in columns:
                if column in table.column_names:
                    digest.update(json.dumps([column, table[column].to_pylist()]).encode())
            found[split] = digest.hexdigest()
        return found

    def limited(self, limit: int | Mapping[str, int] | None, seed: int = 0) -> Task:
        """This task with at most so many rows, drawn without replacement by `seed` and in the drawn order.

        A number limits the training rows only; a mapping names splits. Noted in the provenance.
        """
        check_whole("seed", seed, least=0)
        if limit is None:
            return self
        limits = dict(limit) if isinstance(limit, Mapping) else {"train": limit}
        for split, rows in limits.items():
            check_choice("limit's split", split, self.splits)
            check_whole("limit", rows, least=1)
        chosen = {
            split: draw(rows, limits[split], seed) if split in limits else rows
            for split, rows in self.splits.items()
        }
        kept = {split: rows.num_rows for split, rows in chosen.items()}
        provenance = {**self.provenance, "rows": kept, "limit": limits, "limit_seed": seed}
        return replace(self, splits=DatasetDict(chosen), provenance=provenance)


def is_test(split: str) -> bool:
    """Whether a split is one to test on: `test` itself, or a further one such as `test_mismatched`."""
    return split.startswith("test")


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several names, or one of them alone."""
    return (value,) if isinstance(value, str) else tuple(value)


def _check_split_names(splits: object) -> None:
    present = list(splits) if isinstance(splits, Mapping) else type(splits).__name__
    if not isinstance(splits, Mapping) or not {"train", "test"} <= set(splits):
        raise ArgumentError(f"splits={present!r} is not allowed; a task needs the splits 'train' and 'test'")
    for name in splits:
        if name not in ("train", "validation") and not is_test(name):
            known = ("train", "validation", "test")
            hint = " Did you mean 'validation'?" if name in _SYNONYMS else suggestion(name, known)
            raise ArgumentError(
                f"splits={present!r} is not allowed: nothing would read {name!r}. A task has 'train', 'test', further "
                f"splits to test on ('test_…') and perhaps 'validation'.{hint} Rename the split, or leave it out"
            )


def _plain_rows(rows: object, where: str) -> Dataset:
    """The rows as a data set that gives plain values of all its columns."""
    if isinstance(rows, pd.DataFrame):
        try:
            return in_memory(pa.Table.from_pandas(rows, preserve_index=False))
        except pa.ArrowException as error:
            raise DataError(f"{where} cannot be read from its DataFrame: {error}") from None
    if isinstance(rows, IterableDataset):
        raise DataError(
            f"{where} streams its rows, but training draws them by number; load it without streaming=True"
        )
    if not isinstance(rows, Dataset):
        raise DataError(f"{where} is a {type(rows).__name__}; give a datasets.Dataset or a pandas DataFrame")
    if rows.format["type"] == "custom":
        raise DataError(
            f"{where} has a transform (set_transform), which would not be applied; use map instead"
        )
    return rows.with_format(None)


def draw(rows: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` rows, drawn without replacement and shuffled by `seed`."""
    order = np.random.default_rng(seed).permutation(rows.num_rows)[:count]
    return rows.select(order)


def in_memory(columns: Mapping[str, Any] | pa.Table) -> Dataset:
    """A data set of these columns, nothing of it on disk; texts become `string`, labels int64 or float32."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    fields = [
        pa.field(name, _plain(name, kind))
        for name, kind in zip(table.column_names, table.schema.types, strict=True)
    ]
    return Dataset(table.cast(pa.schema(fields)))


def _plain(name: str, kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(kind):
        return pa.string()
    if name == "label" and pa.types.is_floating(kind):
        return pa.float32()
    return pa.int64() if name == "label" and pa.types.is_integer(kind) else kind


def check_rows(rows: Dataset, text_columns: tuple[str, ...], kind: str, n_labels: int, where: str) -> None:
    """Raise `DataError` unless the rows have the promised text columns and labels; `where` names the file or split."""
    table = rows.with_format("arrow")[:]
    if not len(table):
        raise DataError(f"{where} has no rows")
    for column in (*text_columns, *(() if kind == "span" else ("label",))):
        if column not in table.column_names:
            raise DataError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, table.column_names))}"
            )
    for column in text_columns:
        _check_texts(table[column], column, where)
    if kind == "span":
        _check_answers(table, where)
    else:
        _check_labels(table["label"], kind, n_labels, where)


def _check_texts(values: pa.ChunkedArray, column: str, where: str) -> None:
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(f"{where}: column {column!r} holds {values.type}, not strings")
    if values.null_count:
        raise DataError(f"{where}: column {column!r} has no text in row {_first(values.is_null())}")


def _check_labels(values: pa.ChunkedArray, kind: str, n_labels: int, where: str) -> None:
    if values.null_count:
        raise DataError(f"{where}: column 'label' has no value in row {_first(values.is_null())}")
    right = pa.types.is_integer if kind == "classification" else pa.types.is_floating
    if not right(values.type):
        wanted = "whole numbers" if kind == "classification" else "floats"
        raise DataError(f"{where}: column 'label' holds {values.type}; {kind} needs {wanted}")
    numbers = values.to_numpy()
    wrong = (numbers < 0) | (numbers >= n_labels) if kind == "classification" else ~np.isfinite(numbers)
    if wrong.any():
        row = int(np.argmax(wrong))
        allowed = f"0 to {n_labels - 1}" if kind == "classification" else "finite numbers"
        raise DataError(f"{where}: column 'label' has {numbers[row]} in row {row}; allowed are {allowed}")


def _check_label_names(rows: Dataset, labels: tuple[str, ...], where: str) -> None:
    """Refuse a data set that names its labels itself, in another order."""
    column = rows.features.get("label")
    if isinstance(column, ClassLabel) and set(column.names) == set(labels) and tuple(column.names) != labels:
        raise DataError(
            f"{where}: column 'label' numbers {column.names!r}, but the task has labels={labels!r}"
        )


def _check_answers(table: pa.Table, where: str) -> None:
    """Every row must have an answer, and each answer must stand in its context where it is said to."""
    if "answers" not in table.column_names or not pa.types.is_struct(table["answers"].type):
        raise DataError(
            f"{where}: a span task needs a column 'answers' of {{'text': […], 'answer_start': […]}}"
        )
    contexts, answers = table["context"].to_pylist(), table["answers"].to_pylist()
    for row, (context, given) in enumerate(zip(contexts, answers, strict=True)):
        texts, starts = (given or {}).get("text"), (given or {}).get("answer_start")
        if not texts or not starts or len(texts) != len(starts):
            raise DataError(
                f"{where}: row {row} has answers={given!r}; every row needs one or more texts with their starts"
            )
        for text, start in zip(texts, starts, strict=True):
            if not text or start < 0 or context[start : start + len(text)] != text:
                raise DataError(
                    f"{where}: row {row} has the answer {text!r}, which is not in its context at {start}"
                )


def _first(mask: pa.ChunkedArray) -> int:
    return int(np.argmax(mask.to_numpy()))
