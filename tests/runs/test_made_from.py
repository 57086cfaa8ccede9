"""A run counts as done only while what it was made from is what lies here under the same names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file, save_file

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.fingerprint import first_values
from hadamard_toolkit.backbones import backbone_provenance
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.made_from import Here
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep
from hadamard_toolkit.sites import Sites
from hadamard_toolkit.tasks import TASKS
from hadamard_toolkit.tasks.base import Task, in_memory
from tests.training.tiny import tiny_task

MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def spec(
    make_spec: MakeSpec,
    backbone_folder: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RunSpec:
    """A quick spec on a backbone and data that the test may change."""
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    shutil.copytree(data_root, tmp_path / "data")
    made = make_spec(adapter=ht.HeadOnly(), backbone=str(tmp_path / "backbone"))
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "data"))
    return made


@pytest.fixture
def store(spec: RunSpec, tmp_path: Path) -> RunStore:
    """A store with the run of `spec`."""
    store = RunStore(tmp_path / "store")
    run(spec, store)
    return store


def change_backbone(spec: RunSpec) -> None:
    """Save other weights in place, of the same shapes."""
    path = Path(spec.backbone) / "model.safetensors"
    state = load_file(path)
    state["encoder.layer.0.output.dense.weight"].neg_()
    save_file(state, path, {"format": "pt"})


def flip_labels(root: Path, stem: str = "train") -> None:
    path = root / "glue" / "SST-2" / f"{stem}.parquet"
    table = pq.read_table(path)
    flipped = pa.array([1 - label for label in table["label"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(table.column_names.index("label"), "label", flipped), path)


def refused_everywhere(spec: RunSpec, store: RunStore, *named: str) -> None:
    """By `run`, by `restore` and by `sweep`, which goes on with the rest; all name what differs and the way out."""
    other = replace(spec, seed=7)
    table = sweep([spec, other], store)
    assert table["status"].tolist() == ["outdated", "done"]
    refusals = [table["reason"][0]]
    for attempt in (lambda: run(spec, store), store.run(spec.key).restore):
        with pytest.raises(DataError) as refused:
            attempt()
        refusals.append(str(refused.value))
    for refusal in refusals:
        for part in (spec.key, "another store", "store.set_aside(store.outdated()['key'])", *named):
            assert part in refusal
    outdated = store.outdated()
    assert outdated["key"].tolist() == [spec.key]
    assert outdated[["backbone", "task", "label", "seed"]].iloc[0].tolist() == [
        spec.backbone,
        "sst2",
        "HeadOnly()",
        0,
    ]
    assert all(part in outdated["reason"][0] for part in named)


def test_nothing_changed_is_no_difference(spec: RunSpec, store: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "backbone", tmp_path / "copy")
    shutil.rmtree(tmp_path / "backbone")
    shutil.copytree(tmp_path / "copy", tmp_path / "backbone")  # the same bytes at another time
    rows = tmp_path / "data" / "glue" / "SST-2" / "train.parquet"
    pq.write_table(pq.read_table(rows), rows, compression="gzip")  # the same rows in other bytes
    assert run(spec, store).attachment is None
    assert sweep([spec], store)["status"].tolist() == ["present"]
    assert store.outdated().empty
    store.run(spec.key).restore()


def test_a_backbone_saved_again_in_place_is_refused(spec: RunSpec, store: RunStore) -> None:
    then = store.record(spec.key)["meta_info"]["backbone"]["sha256"]["model.safetensors"]
    change_backbone(spec)
    refused_everywhere(
        spec, store, f"backbone '{spec.backbone}' 'model.safetensors' was SHA-256 {then[:12]}… and is SHA-256"
    )


def test_another_vocabulary_is_another_backbone(spec: RunSpec, store: RunStore) -> None:
    path = Path(spec.backbone) / "tokenizer.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said, indent=7))  # says the same
    assert store.outdated().empty
    words = said["model"]["vocab"]
    words["fine"], words["grim"] = words["grim"], words["fine"]
    path.write_text(json.dumps(said))
    refused_everywhere(spec, store, "'tokenizer.json' was SHA-256")


def test_a_vocabulary_that_is_read_otherwise_is_another_backbone(spec: RunSpec, store: RunStore) -> None:
    path = Path(spec.backbone) / "tokenizer_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "padding_side": "left", "model_max_length": 7}))  # no ids change
    assert store.outdated().empty
    path.write_text(json.dumps({**said, "truncation_side": "left"}))
    refused_everywhere(spec, store, "'tokenizer_config.json' was SHA-256")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_other_special_tokens_are_another_backbone(spec: RunSpec, store: RunStore, name: str) -> None:
    path = Path(spec.backbone) / name
    path.write_text('{"cls_token": "bad"}' if name.startswith("special") else '{"bad": 5}')
    changed = backbone_provenance(spec.backbone)["files"][name]
    path.write_text(path.read_text().replace(": ", " :  "))
    assert backbone_provenance(spec.backbone)["files"][name] == changed
    with pytest.raises(DataError, match=rf"'{name}' was not there and is SHA-256"):
        run(spec, store)


def test_data_with_flipped_labels_are_refused(spec: RunSpec, store: RunStore, tmp_path: Path) -> None:
    flip_labels(tmp_path / "data")
    refused_everywhere(spec, store, "task 'sst2', split 'train' was SHA-256")
    with pytest.raises(DataError):
        store.run(spec.key).restore(data=True)
    assert store.run(spec.key).restore(data=False)[2].adapter == spec.adapter


def test_data_that_can_no_longer_be_read_are_others(spec: RunSpec, store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "data" / "glue" / "SST-2" / "train.parquet").write_bytes(b"no rows any more")
    [reason] = store.outdated()["reason"]
    assert "task 'sst2' 'glue/SST-2/train.parquet' was SHA-256" in reason
    with pytest.raises(DataError, match=r"train\.parquet"):
        run(spec, store)


def test_data_from_elsewhere_are_refused(
    spec: RunSpec, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    flip_labels(tmp_path / "elsewhere", "dev")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "elsewhere"))
    refused_everywhere(spec, store, "task 'sst2', split 'test' was SHA-256")


def test_data_of_your_own_under_the_same_name_are_refused(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(rows: int) -> Callable[..., Task]:
        return lambda root: replace(tiny_task(train=rows), name="mine")

    monkeypatch.setitem(TASKS, "mine", own(96))
    spec, store = replace(spec, task="mine"), RunStore(tmp_path / "store")
    run(spec, store)
    assert run(spec, store).attachment is None
    monkeypatch.setitem(TASKS, "mine", own(97))
    with pytest.raises(DataError, match="task 'mine', split 'train' was SHA-256"):
        run(spec, store)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": ("good", "bad")}, r"'label_names' was \['bad', 'good'\] and is \['good', 'bad'\]"),
        ({"metric": "f1", "metrics": ("f1", "accuracy")}, "'metric' was accuracy and is f1"),
    ],
)
@pytest.mark.parametrize("source", ["a list", "local parquet files, mine"])
def test_other_label_names_or_another_metric_on_the_same_rows_are_refused(
    spec: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
    source: str,
) -> None:
    task = replace(tiny_task(), name="mine", labels=("bad", "good"), provenance={"source": source})
    monkeypatch.setitem(TASKS, "mine", lambda root: task)
    spec, store = replace(spec, task="mine"), RunStore(tmp_path / "store")
    run(spec, store)
    assert run(spec, store).attachment is None
    other = replace(task, **changes)
    assert other.content() == task.content()
    monkeypatch.setitem(TASKS, "mine", lambda root: other)
    with pytest.raises(DataError, match=f"task 'mine' {reason}"):
        run(spec, store)
    path = store.folder / spec.key / "run.json"
    record = json.loads(path.read_text())
    del record["meta_info"]["task"]["label_names"], record["meta_info"]["task"]["metric"]
    path.write_text(json.dumps(record))  # as earlier versions wrote it
    assert run(spec, store).attachment is None


def test_a_split_that_came_or_went_is_refused(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(tiny_task(), name="mine")
    more = replace(task, splits=DatasetDict({**task.splits, "test_other": task.splits["test"]}))
    spec = replace(spec, task="mine")
    for first, then, said in (
        (task, more, "was not there and is SHA-256"),
        (more, task, "was SHA-256 .* and is not there"),
    ):
        store = RunStore(tmp_path / said)
        monkeypatch.setitem(TASKS, "mine", lambda root, first=first: first)
        run(spec, store)
        monkeypatch.setitem(TASKS, "mine", lambda root, then=then: then)
        with pytest.raises(DataError, match=f"task 'mine', split 'test_other' {said}"):
            run(spec, store)


def test_what_is_not_here_is_no_difference(
    spec: RunSpec, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "backbone")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("hadamard_toolkit.tasks.places.read_hub", lambda *_: pytest.fail("asked the hub"))
    assert run(spec, store).score == store.run(spec.key).score
    assert store.outdated().empty


def test_a_record_from_before_these_facts_is_accepted_or_judged_by_those_it_has(
    spec: RunSpec, store: RunStore, tmp_path: Path
) -> None:
    path = store.folder / spec.key / "run.json"
    record = json.loads(path.read_text())
    del record["meta_info"]["backbone"]["files"], record["meta_info"]["task"]["content"]
    path.write_text(json.dumps(record))
    assert store.outdated().empty
    flip_labels(tmp_path / "data")
    then = record["meta_info"]["task"]["files"]["glue/SST-2/train.parquet"][:12]
    refused_everywhere(spec, store, f"task 'sst2' 'glue/SST-2/train.parquet' was SHA-256 {then}…")
    record["meta_info"] = {"device": {}, "backbone": {}, "task": {}}
    path.write_text(json.dumps(record))
    assert run(spec, store).attachment is None


def test_runs_set_aside_make_room_and_stay(spec: RunSpec, store: RunStore) -> None:
    for number in (1, 2):
        (store.folder / ".sources" / spec.key).mkdir(parents=True)  # weights kept for a fusion
        change_backbone(spec)
        aside = store.set_aside(store.outdated()["key"])
        assert store.outdated().empty
        assert spec not in store
        assert store.load().empty
        assert (aside / f"{spec.key}.{number}" / "run.json").is_file()
        assert (aside / f"{spec.key}.{number}" / ".sources").is_dir()
        assert run(spec, store).attachment is not None
        assert store.keys() == [spec.key]
    (store.folder / spec.key).rename(aside / "done")
    (aside / f"{spec.key}.1").rename(store.folder / spec.key)  # and back
    assert store.outdated().empty, "negated twice, the backbone is what it was made from"


def test_a_fusion_over_an_outdated_run_is_outdated(
    spec: RunSpec, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tmp_path / "data" / "glue" / "SST-2", tmp_path / "data" / "glue" / "CoLA")
    fusion = replace(spec, adapter=ht.AdapterFusion(("sst2",), bottleneck=4), task="cola")
    run(fusion, store)
    assert store.outdated().empty
    flip_labels(tmp_path / "data")
    outdated = store.outdated().set_index("key")["reason"]
    assert len(outdated) == 3
    source = next(key for key in outdated.index if key not in (spec.key, fusion.key))
    assert outdated[fusion.key].startswith(f"it builds on run {source}: task 'sst2'")
    with pytest.raises(DataError, match=f"run {source} was made from other content"):
        run(fusion, store)
    other = replace(fusion, seed=0, protocol=replace(fusion.protocol, learning_rate=0.5))
    assert run(other, store).attachment is not None, "of another key, so nothing stands in its way"


def test_each_thing_is_looked_at_once(
    spec: RunSpec, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    real = ht.load_task

    def load(name: str) -> Task:
        looked.append(name)
        return real(name)

    flip_labels(tmp_path / "data")
    monkeypatch.setattr("hadamard_toolkit.tasks.registry.load_task", load)
    here, record = Here(), store.record(spec.key)
    assert here.changes_of(record) == here.changes_of(record) != []
    assert looked == ["sst2"]


def test_files_that_are_as_recorded_are_not_read_as_rows(
    spec: RunSpec, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hadamard_toolkit.tasks.registry.load_task",
        lambda *_: pytest.fail("read the rows of an unchanged file"),
    )
    run(spec, store)


def test_content_is_that_of_the_rows() -> None:
    task = tiny_task()
    again = tiny_task()
    assert task.content() == again.content()
    assert set(task.content()) == {"train", "test"}
    texts = task.splits["train"]["text"]
    for column, values in (("label", [1] * len(texts)), ("text", list(reversed(texts)))):
        changed = dict(task.splits)
        kept = {name: list(changed["train"][name]) for name in ("text", "label")} | {column: values}
        changed["train"] = in_memory(kept)
        other = replace(task, splits=type(task.splits)(changed)).content()
        assert other["train"] != task.content()["train"]
        assert other["test"] == task.content()["test"]


def test_the_committed_runs_are_all_present(repository: Path) -> None:
    store = RunStore(repository / "data" / "reference_runs")
    assert len(store) > 600
    assert store.outdated().empty


def test_a_run_of_an_older_version_is_restored_without_a_word(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Its file knows only a part of the backbone, but the record knows all of it, and that was compared."""
    spec, store = make_spec(), RunStore(tmp_path / "runs")
    trained = run(spec, store)
    file = tmp_path / "runs" / spec.key / "adapter_config.json"
    config = json.loads(file.read_text())
    model, _ = ht.load_backbone(spec.backbone)
    config["backbone"]["fingerprint"] = first_values(Sites(model).base_parameters())
    file.write_text(json.dumps({**config, "format": 1}))
    with pytest.warns(UserWarning, match="older version"):
        ht.load_attachment(model, file.parent)
    _, _, again = store.run(spec.key).restore()
    assert trained.attachment is not None
    for name, value in trained.attachment.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.labels == list(ht.load_task(spec.task).labels)
