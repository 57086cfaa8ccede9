"""SQuAD from local files: tiny made-up ones, and the real ones where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks import load_task, squad
from tests.local_data import local_data

CONTEXT = "The sky was red, and the sea was red too."


def write(root: Path, stem: str, *answers: tuple[str, int], **columns: Any) -> None:
    (root / "squad").mkdir(exist_ok=True)
    rows = [
        {
            "id": f"{stem}-{number}",
            "title": "",
            "context": CONTEXT,
            "question": "Which colour?",
            "answers": {"text": [text], "answer_start": [start]},
        }
        for number, (text, start) in enumerate(answers)
    ]
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, root / "squad" / f"{stem}.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train", ("red", 12), ("sea", 25), start_unambiguous=[False, True])
    write(tmp_path, "dev", ("red", 12))
    return tmp_path


def test_the_official_dev_rows_are_the_test_split(root: Path) -> None:
    task = load_task("SQuAD", root=root)
    assert (task.name, task.kind, task.head, task.n_labels) == ("squad", "span", "span", 2)
    assert (task.text_columns, task.metrics) == (("question", "context"), ("f1", "exact-match"))
    assert {split: list(rows["id"]) for split, rows in task.splits.items()} == {
        "train": ["train-0", "train-1"],
        "test": ["dev-0"],
    }
    assert task.splits["train"][0]["answers"] == {"text": ["red"], "answer_start": [12]}
    assert task.provenance["subset"] is True
    assert task.provenance["official_rows"] == {"train": 87599, "test": 10570}


def test_leaving_rows_out_makes_a_subset_of_a_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squad, "OFFICIAL", {"train": 2, "test": 1})
    assert load_task("squad", root=root).provenance["subset"] is False
    assert load_task("squad-unambiguous", root=root).provenance["subset"] is True


def test_unambiguous_starts_alone_on_request(root: Path) -> None:
    task = load_task("squad-unambiguous", root=root)
    assert task.name == "squad-unambiguous"
    assert list(task.splits["train"]["id"]) == ["train-1"]
    assert task.splits["test"].num_rows == 1
    assert task.provenance["rows"]["train"] == 1
    assert task.provenance["subset"] is True
    assert task.provenance["note"].endswith("1 training rows left out whose answer occurs more than once")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"text": ["red"], "answer_start": [13]},
            "row 0 has the answer 'red', which is not in its context at 13",
        ),
        ({"text": ["red"], "answer_start": [-29]}, "not in its context at -29"),
        ({"text": [""], "answer_start": [0]}, "row 0 has the answer ''"),
        ({"text": ["red"], "answer_start": [12, 33]}, "every row needs one or more texts with their starts"),
        ({"text": [], "answer_start": []}, "every row needs one or more texts with their starts"),
    ],
)
def test_an_answer_that_is_not_where_it_is_said_to_be_is_refused(
    root: Path, answers: dict[str, Any], message: str
) -> None:
    kind = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))])
    table = pq.read_table(root / "squad" / "dev.parquet")
    table = table.set_column(table.column_names.index("answers"), "answers", pa.array([answers], kind))
    pq.write_table(table, root / "squad" / "dev.parquet")
    with pytest.raises(DataError, match=message):
        load_task("squad", root=root)


def test_the_real_files_are_as_the_data_card_says() -> None:
    folder = local_data("squad")
    task = load_task("squad", root=folder)  # loading has found every answer in its context
    assert {split: rows.num_rows for split, rows in task.splits.items()} == {"train": 8149, "test": 10570}
    assert task.provenance["note"] == "subset: train 8,149 of 87,599 rows (9.3%)"
    alone = load_task("squad-unambiguous", root=folder).splits["train"].num_rows
    assert 0.88 < alone / 8149 < 0.91
