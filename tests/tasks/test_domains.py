"""The tasks of four domains: tiny made-up files, a hub on this machine, and the real files where they are at hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks import load_task
from hadamard_toolkit.tasks.domains import SOURCES
from tests.hub_stand_in import hub
from tests.local_data import local_data

CARD = {  # rows of train, dev and test, texts that two splits share, and whether rows are missing: the data card
    "chemprot": ((4169, 2427, 3469), {"train/test": 4}, False),
    "acl-arc": ((1688, 114, 139), {"train/validation": 43, "train/test": 48, "validation/test": 7}, False),
    "scierc": ((3219, 455, 974), {}, False),
    "hyperpartisan": ((515, 65, 65), {"train/validation": 1}, False),
    "agnews": ((4000, 999, 7600), {}, True),
    "imdb": ((20000, 5000, 25000), {"train/validation": 23, "train/test": 93, "validation/test": 30}, False),
}


def write(root: Path, name: str, labels: list[str] | None = None, **changes: Any) -> Path:
    """Two rows per split in the layout of a task; `changes` replace columns of the training split."""
    folder = root / "domains" / SOURCES[name].folder
    folder.mkdir(parents=True)
    for stem in ("train", "dev", "test"):
        columns: dict[str, Any] = {"text": [f"{stem} a", "everywhere"], "label": [0, 1]}
        pq.write_table(pa.table(columns | (changes if stem == "train" else {})), folder / f"{stem}.parquet")
    (folder / "labels.json").write_text(json.dumps(list(labels or SOURCES[name].labels)))
    return folder


@pytest.mark.parametrize("spelling", ["acl-arc", "ACL_ARC", "domains/ACL-ARC", "Domains/aclarc"])
def test_any_spelling_gives_the_task_with_its_own_validation_split(tmp_path: Path, spelling: str) -> None:
    write(tmp_path, "acl-arc")
    task = load_task(spelling, root=tmp_path)
    assert (task.name, task.kind, task.n_labels, task.text_columns) == (
        "acl-arc",
        "classification",
        6,
        ("text",),
    )
    assert {split: rows["text"][0] for split, rows in task.splits.items()} == {
        "train": "train a",
        "validation": "dev a",
        "test": "test a",
    }


def test_headline_metrics_are_those_of_the_original_tasks() -> None:
    micro = {name for name, source in SOURCES.items() if source.metrics[0] == "micro-f1"}
    assert micro == {"chemprot", "rct"}
    assert {source.metrics[0] for name, source in SOURCES.items() if name not in micro} == {"macro-f1"}


def test_provenance_compares_rows_hashes_files_and_counts_shared_texts(tmp_path: Path) -> None:
    write(tmp_path, "hyperpartisan")
    record = load_task("hyperpartisan", root=tmp_path).provenance
    assert record["subset"] is True
    assert record["note"].startswith("subset: train 2 of 515 rows (0.4%); validation 2 of 65")
    assert "own random stratified split" in record["note"]
    assert record["duplicates"] == {"train/validation": 1, "train/test": 1, "validation/test": 1}
    assert (record["domain"], record["rows"]["test"]) == ("news", 2)
    assert len(record["files"]) == 4
    for file, digest in record["files"].items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["pos", "neg"]}, r"lists the labels \['pos', 'neg'\]; the task has \['neg', 'pos'\]"),
        ({"label": [0, 2]}, "column 'label' has 2 in row 1; allowed are 0 to 1"),
        ({"label": ["neg", "so so"]}, "column 'label' has 'so so'; allowed are 'neg', 'pos'"),
        ({"text": ["a", None]}, "column 'text' has no text in row 1"),
    ],
)
def test_rows_and_labels_that_are_not_the_tasks_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, "imdb", **changes)
    with pytest.raises(DataError, match=message):
        load_task("imdb", root=tmp_path)


def test_labels_by_name_are_numbered(tmp_path: Path) -> None:
    write(tmp_path, "chemprot", label=["Agonist_Activator", "upregulator"])
    assert load_task("chemprot", root=tmp_path).splits["train"]["label"][:] == [2, 12]


def test_labels_json_is_checked_like_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path, "imdb")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  domains/IMDB/labels.json\n")
    with pytest.raises(DataError, match=r"labels.json is not the file that SHA256SUMS lists"):
        load_task("imdb", root=tmp_path)
    (folder / "labels.json").unlink()
    with pytest.raises(DataError, match=r"labels.json is missing"):
        load_task("imdb", root=tmp_path)


@pytest.mark.parametrize("name", ["rct", "helpfulness"])
def test_a_task_of_the_hub_alone_is_refused_offline(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path))
    with pytest.raises(DataError) as refused:
        load_task(name)
    for part in (name, SOURCES[name].hub, "cannot be read", "HADAMARD_DATA", "embedded/"):
        assert part in str(refused.value)


VISITOR = """
import json
from hadamard_toolkit.tasks import load_task
said = {}
for name in ("rct", "agnews", "squad"):
    task = load_task(name)
    said[name] = {
        "rows": {split: rows.num_rows for split, rows in task.splits.items()},
        "first": task.splits["test"][0],
        "labels": [row["label"] for row in task.splits["train"]] if task.kind != "span" else [],
        "provenance": task.provenance,
    }
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process found that met only the stand-in for the hub."""
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    rct, news, squad = (
        folder / SOURCES["rct"].hub,
        folder / SOURCES["agnews"].hub,
        folder / "rajpurkar" / "squad",
    )
    for path in (rct, news / "data", squad / "plain_text"):
        path.mkdir(parents=True)
    for stem in ("train", "dev", "test"):
        rows = [
            {"text": f"{stem} {label}", "label": label, "metadata": {}} for label in ("METHODS", "background")
        ]
        (rct / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"text": [split], "label": [2]}), news / "data" / f"{split}-00000-of-00001.parquet"
        )
    label = {"class_label": {"names": {str(i): name for i, name in enumerate(SOURCES["agnews"].labels)}}}
    features = [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": label}]
    head(news, {"dataset_info": {"features": features}})
    answers = {"text": ["red"], "answer_start": [7]}
    for split in ("train", "validation"):
        row = {"id": split, "title": "", "context": "it was red", "question": "how?", "answers": answers}
        pq.write_table(pa.Table.from_pylist([row]), squad / "plain_text" / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"plain_text/{split}-*"} for split in ("train", "validation")]
    head(squad, {"configs": [{"config_name": "plain_text", "data_files": files}]})
    with hub(folder) as (endpoint, _):
        offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
        environment = {key: value for key, value in os.environ.items() if key not in offline}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HADAMARD_DATA": str(home / "nothing"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        finished = subprocess.run(
            [sys.executable, "-c", VISITOR],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def head(folder: Path, about: dict[str, Any]) -> None:
    (folder / "README.md").write_text(f"---\n{json.dumps(about)}\n---\n")  # JSON is YAML


def test_from_the_hub_named_labels_are_numbered(said: dict[str, Any]) -> None:
    found = said["rct"]
    assert found["rows"] == {"train": 2, "validation": 2, "test": 2}
    assert found["labels"] == [2, 0]
    assert found["first"] == {"text": "test METHODS", "label": 2}
    assert found["provenance"]["source"] == "hub zapsdcn/rct-20k"
    assert found["provenance"]["subset"] is True


def test_from_the_hub_a_missing_validation_split_is_said(said: dict[str, Any]) -> None:
    found = said["agnews"]
    assert found["rows"] == {"train": 1, "test": 1}
    assert found["labels"] == [2]
    assert found["provenance"]["official_rows"] == {"train": 120000, "test": 7600}
    assert "no validation split" in found["provenance"]["note"]


def test_squad_from_the_hub(said: dict[str, Any]) -> None:
    found = said["squad"]
    assert found["rows"] == {"train": 1, "test": 1}
    assert (found["first"]["id"], found["first"]["answers"]) == (
        "validation",
        {"text": ["red"], "answer_start": [7]},
    )
    assert found["provenance"]["source"] == "hub rajpurkar/squad"


@pytest.mark.parametrize("name", CARD)
def test_the_real_files_are_as_the_data_card_says(name: str) -> None:
    task = load_task(name, root=local_data("domains"))
    rows, shared, subset = CARD[name]
    assert tuple(split.num_rows for split in task.splits.values()) == rows
    assert task.provenance["duplicates"] == shared
    assert task.provenance["subset"] is subset
    assert set(task.splits["train"]["label"]) == set(range(task.n_labels))
