"""GLUE from local files: tiny made-up ones, and the real ones where they are at hand. The hub is in test_hub.py."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks import load_task
from hadamard_toolkit.tasks.glue import SOURCES

REAL = {  # rows and share of label 1 (mean score for STS-B) of the official validation files
    "cola": (1043, 0.691),
    "sst2": (872, 0.509),
    "mrpc": (408, 0.684),
    "stsb": (1500, 2.364),
    "rte": (277, 0.473),
}


def _write(root: Path, task: str, stem: str, **columns: Any) -> Path:
    folder = root / "glue" / SOURCES[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{stem}.parquet")
    return folder / f"{stem}.parquet"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for stem in ("train", "dev"):
        _write(
            tmp_path,
            "sst2",
            stem,
            sentence=[f"{stem} a", f"{stem} b"],
            label=[0, 1],
            idx=[0, 1],
            source=["x", "y"],
        )
    return tmp_path


def test_official_dev_is_the_test_split(root: Path) -> None:
    task = load_task("SST-2", root=root)
    assert task.name == "sst2"
    assert list(task.splits) == ["train", "test"]
    assert task.splits["test"][1] == {"sentence": "dev b", "label": 1, "idx": 1}
    assert (task.kind, task.labels, task.metric) == ("classification", ("negative", "positive"), "accuracy")


def test_provenance_says_subset_and_hashes_the_files(root: Path) -> None:
    record = load_task("sst2", root=root, limit=1, seed=4).provenance
    assert record["subset"] is True
    assert record["note"] == "subset: train 2 of 67,349 rows (0.0%); test 2 of 872 rows (0.2%)"
    assert record["official_rows"] == {"train": 67349, "test": 872}
    assert (record["rows"], record["limit"], record["limit_seed"]) == (
        {"train": 1, "test": 2},
        {"train": 1},
        4,
    )
    for file, digest in record["files"].items():
        assert hashlib.sha256((root / file).read_bytes()).hexdigest() == digest


def test_mnli_has_two_test_splits(tmp_path: Path) -> None:
    for stem in ("train", "dev_matched", "dev_mismatched"):
        _write(
            tmp_path, "mnli", stem, premise=[stem] * 3, hypothesis=["h"] * 3, label=[0, 1, 2], idx=[0, 1, 2]
        )
    task = load_task("mnli", root=tmp_path)
    assert {split: rows[0]["premise"] for split, rows in task.splits.items()} == {
        "train": "train",
        "test": "dev_matched",
        "test_mismatched": "dev_mismatched",
    }
    assert task.labels == ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("name", SOURCES)
def test_the_hub_s_official_validation_rows_are_the_test_split(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub also has a split "test", whose labels are all -1; every split here holds its own name as text."""
    source, asked = SOURCES[name], []
    ends = ("_matched", "_mismatched") if name == "mnli" else ("",)
    theirs = ["train", *(f"{split}{end}" for split in ("validation", "test") for end in ends)]

    def load_dataset(hub: str, config: str) -> DatasetDict:
        asked.append((hub, config))
        rows = {}
        for split in theirs:
            label = -1 if split.startswith("test") else 0
            texts = {column: [split] for column in source.text_columns}
            label_ = float(label) if source.kind == "regression" else label
            rows[split] = Dataset.from_dict({**texts, "label": [label_], "idx": [0]})
        return DatasetDict(rows)

    monkeypatch.setattr("hadamard_toolkit.tasks.places.load_dataset", load_dataset)
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path))
    task = load_task(name)
    assert asked == [("nyu-mll/glue", name)]
    assert task.provenance["source"] == "hub nyu-mll/glue"
    found = {split: rows[source.text_columns[-1]][0] for split, rows in task.splits.items()}
    if name == "mnli":
        wanted = {"test": "validation_matched", "test_mismatched": "validation_mismatched"}
    else:
        wanted = {"test": "validation"}
    assert found == {"train": "train", **wanted}


OFFICIAL = {  # columns, label names by number, and headline metric, as GLUE has them
    "cola": (("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": (("sentence",), ("negative", "positive"), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "stsb": (("sentence1", "sentence2"), (), "spearman"),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
}


def test_columns_labels_and_metrics_are_those_of_glue() -> None:
    found = {
        name: (source.text_columns, source.labels, source.metrics[0]) for name, source in SOURCES.items()
    }
    assert found == OFFICIAL


def test_as_many_rows_as_the_official_ones_are_no_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem, count in (("train", 2), ("dev", 3)):
        columns = {name: ["x"] * count for name in ("sentence1", "sentence2")}
        _write(tmp_path, "rte", stem, **columns, label=[0] * count, idx=list(range(count)))
    monkeypatch.setitem(SOURCES, "rte", dataclasses.replace(SOURCES["rte"], rows={"train": 2, "test": 3}))
    record = load_task("rte", root=tmp_path).provenance
    assert (record["subset"], record["note"]) == (False, "")


def test_stsb_scores_are_float32(tmp_path: Path) -> None:
    for stem in ("train", "dev"):
        _write(tmp_path, "stsb", stem, sentence1=["a"], sentence2=["b"], label=[2.5], idx=[0])
    task = load_task("stsb", root=tmp_path)
    assert task.splits["train"].features["label"].dtype == "float32"
    assert (task.kind, task.labels, task.metrics) == ("regression", (), ("spearman", "pearson"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "label": [1]}, "has no column 'sentence'; it has 'text', 'label'"),
        ({"sentence": ["a"], "label": [2]}, "column 'label' has 2 in row 0; allowed are 0 to 1"),
        (
            {"sentence": ["a"], "label": [0.3]},
            "column 'label' holds float; classification needs whole numbers",
        ),
        ({"sentence": [None, "a"], "label": [0, 1]}, "column 'sentence'"),
    ],
)
def test_a_bad_file_is_named_with_column_and_value(root: Path, columns: dict[str, Any], message: str) -> None:
    path = _write(root, "sst2", "train", **columns)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        load_task("sst2", root=root)


def test_a_missing_or_broken_file_is_named(root: Path) -> None:
    path = root / "glue" / "SST-2" / "dev.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=f"{path} is no readable parquet file"):
        load_task("sst2", root=root)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        load_task("sst2", root=root)


@pytest.mark.parametrize("before", ["  ", " *"])  # as `sha256sum` and `sha256sum --binary` write it
def test_a_file_that_differs_from_its_listed_sum_is_refused(root: Path, before: str) -> None:
    file = "glue/SST-2/train.parquet"
    found = hashlib.sha256((root / file).read_bytes()).hexdigest()
    (root / "SHA256SUMS").write_text(f"{found}{before}{file}\n")
    assert load_task("sst2", root=root).provenance["files"][file] == found
    (root / "SHA256SUMS").write_text(f"{'0' * 64}{before}{file}\n")
    with pytest.raises(
        DataError, match=f"{file} is not the file that SHA256SUMS lists: expected 0+, found {found}"
    ):
        load_task("sst2", root=root)


def test_the_environment_names_a_root_and_an_argument_beats_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(root))
    assert load_task("sst2").splits["train"].num_rows == 2
    with pytest.raises(DataError, match=r"elsewhere/glue/SST-2 \(root\) does not exist"):
        load_task("sst2", root=tmp_path / "elsewhere")


def test_no_place_at_all_names_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError) as refused:
        load_task("qnli")
    for part in (
        "'qnli' was not found",
        str(tmp_path / "empty"),
        "$HADAMARD_DATA",
        "nyu-mll/glue",
        "embedded/",
    ):
        assert part in str(refused.value)


@pytest.mark.glue
@pytest.mark.parametrize("name", SOURCES)
def test_the_real_files(glue_root: Path, name: str) -> None:
    task = load_task(name, root=glue_root, limit=50)
    record, official = task.provenance, SOURCES[name].rows
    assert task.splits["train"].num_rows == 50
    assert record["subset"] is bool(record["note"])
    if not record["subset"]:
        rows = load_task(name, root=glue_root).provenance["rows"]
        assert rows == official
        labels = task.splits["test"]["label"][:]
        assert (len(labels), pytest.approx(sum(labels) / len(labels), abs=5e-4)) == REAL[name]
