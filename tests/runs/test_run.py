from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, TrainingError
from hadamard_toolkit.runs.labels import label_of, method_name
from hadamard_toolkit.runs.record import Run, is_subset
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.tasks import load_task
from hadamard_toolkit.training.task_types import Labelled
from tests.permissions import read_only
from tests.runs.conftest import PROTOCOL

MakeSpec = Callable[..., RunSpec]
FILES = {
    "run.json",
    "history.jsonl",
    "predictions.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
}


def bytes_of(store: Path, spec: RunSpec, name: str) -> bytes:
    return (store / spec.key / name).read_bytes()


def test_same_spec_gives_the_same_bytes(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    first = run(spec, tmp_path / "a")
    np.random.default_rng().random()
    torch.manual_seed(99)  # what happened before must not matter
    second = run(spec, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json", "predictions.safetensors"):
        assert bytes_of(tmp_path / "a", spec, name) == bytes_of(tmp_path / "b", spec, name)
    assert first.metrics == second.metrics
    other = make_spec(seed=1)
    run(other, tmp_path / "a")
    weights = "adapter_model.safetensors"
    assert bytes_of(tmp_path / "a", spec, weights) != bytes_of(tmp_path / "a", other, weights)


def test_runs_of_one_process_tokenise_the_same_rows_once(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hadamard_toolkit.runs.run._encoded", cache(lambda made_from: {}))
    counts: list[int] = []
    encode = Labelled.encode
    monkeypatch.setattr(Labelled, "encode", lambda kind, rows: counts.append(len(rows)) or encode(kind, rows))

    def tokenised(**changes: Any) -> list[int]:
        counts.clear()
        run(make_spec(**changes))
        return list(counts)

    assert tokenised() == [96, 40]
    assert tokenised(seed=1, adapter=ht.LoRA(rank=2)) == []
    assert tokenised(protocol=replace(PROTOCOL, max_length=12)) == [96, 40]
    few = tokenised(protocol=replace(PROTOCOL, train_rows=4, validation_rows=4))
    assert few == [8]  # less than a quarter of the split; the test rows are there
    other_backbone = shutil.copytree(make_spec().backbone, tmp_path / "other")
    assert tokenised(backbone=str(other_backbone)) == [96, 40]
    other = tmp_path / "data" / "glue" / "SST-2"
    shutil.copytree(Path(os.environ["HADAMARD_DATA"]) / "glue" / "SST-2", other)
    rows = pd.read_parquet(other / "dev.parquet").iloc[::-1]
    rows.to_parquet(other / "dev.parquet", index=False)
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "data"))
    assert tokenised() == [96, 40]  # other data under the same name
    monkeypatch.setattr("hadamard_toolkit.runs.run.POOLS", 1)
    assert tokenised() == [96, 40]  # forgotten, so that they do not pile up


def test_record_says_how_it_came_about(make_spec: MakeSpec, tmp_path: Path, repository: Path) -> None:
    spec = make_spec()
    finished = run(spec, tmp_path)
    folder = tmp_path / spec.key
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    record = json.loads((folder / "run.json").read_text())
    assert RunSpec.from_dict(record["spec"]) == spec
    assert (record["key"], record["status"], record["headline"]) == (spec.key, "done", "accuracy")
    assert set(record["metrics"]) == {"validation", "test"}
    assert 0 <= record["metrics"]["test"]["accuracy"] <= 1
    # three layers of width 16: W and b, gain and bias of the norm; a head of 2 x 16 + 2 that stage one trained
    assert {role: row["trained"] for role, row in record["counts"].items()} == {
        "adapter": 96,
        "norm": 96,
        "gate": 0,
        "head": 34,
    }
    assert {part: rows["rows"] for part, rows in record["rows"].items()} == {
        "train": 48,
        "validation": 16,
        "test": 40,
    }
    assert {"load", "features", "stage_one", "stage_two", "evaluation", "total"} <= set(record["times"])
    meta = record["meta_info"]
    assert {"python", "torch", "transformers", "datasets", "accelerate", "hadamard_toolkit"} <= set(
        meta["versions"]
    )
    assert meta["device"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert meta["device"]["threads"] == torch.get_num_threads()
    assert meta["task"]["subset"] is True
    assert "96 of 67,349 rows" in meta["task"]["note"]
    assert set(meta["backbone"]["sha256"]) == {"model.safetensors"}
    assert record["train_info"]["peak_memory"]["process_bytes"] > 2**20
    record["spec"]["backbone"] = ""  # the caller's own words
    for place in (tmp_path, repository, Path.home()):
        assert f'"{place}' not in json.dumps(record)
    assert finished.folder == folder
    assert finished.score == record["metrics"]["test"]["accuracy"]


def test_run_that_is_there_is_read_not_trained(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    trained = run(spec, tmp_path)
    monkeypatch.setattr("hadamard_toolkit.runs.run._train", lambda spec: pytest.fail("trained again"))
    found = run(spec, RunStore(tmp_path))
    assert found.attachment is None
    assert (found.spec, found.metrics, found.headline, found.times) == (
        spec,
        trained.metrics,
        trained.headline,
        trained.times,
    )
    pd.testing.assert_frame_equal(found.history, trained.history)
    pd.testing.assert_frame_equal(found.counts, trained.counts, check_dtype=False)
    for split, arrays in trained.predictions.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.predictions[split][name], array)


def test_restored_run_predicts_what_was_recorded(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(seed=3)
    run(spec, tmp_path)
    stored = RunStore(tmp_path).run(spec.key)
    model, tokenizer, attachment = stored.restore()
    test = load_task("sst2").splits["test"]
    predicted = stored.predictions["test"]
    np.testing.assert_array_equal(predicted["labels"], np.asarray(test["label"])[predicted["rows"]])
    batch = tokenizer(
        list(test["sentence"]), truncation=True, max_length=24, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model(**batch).logits.numpy()
    np.testing.assert_allclose(logits[predicted["rows"]], predicted["logits"], atol=1e-5)
    assert attachment.adapter == spec.adapter
    right = (predicted["logits"].argmax(1) == predicted["labels"]).mean()
    assert right == pytest.approx(stored.score)


def test_vectors_come_back_without_a_backbone(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter=ht.Hadamard(layers=(0, 2)))
    trained = run(spec, tmp_path)
    monkeypatch.setattr(
        "hadamard_toolkit.backbones.load_backbone", lambda *a, **k: pytest.fail("loaded a backbone")
    )
    store = RunStore(tmp_path)
    for found in (store.vectors(spec.key), store.run(spec.key).vectors()):
        assert set(found) == set(trained.vectors())
        for name, array in trained.vectors().items():
            np.testing.assert_array_equal(found[name], array)
    assert np.isnan(found["attention_output.weight"][1]).all()


def test_a_store_of_scores_keeps_no_weights(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    run(spec, RunStore(tmp_path, keep="nothing"))
    names = {path.name for path in (tmp_path / spec.key).iterdir()}
    assert names == FILES - {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(DataError, match=r'not kept: the run was made for its scores.*keep="adapters"'):
        RunStore(tmp_path).run(spec.key).restore()


def test_whole_model_is_kept_only_on_request(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(adapter=ht.FullFineTuning())
    run(spec, tmp_path / "small")
    run(spec, RunStore(tmp_path / "large", keep="everything"))
    assert {path.name for path in (tmp_path / "small" / spec.key).iterdir()} == FILES - {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    small = RunStore(tmp_path / "small").run(spec.key)
    assert small.info["run_info"]["weights"].startswith("not kept")
    with pytest.raises(DataError, match=r'not kept.*keep="everything"'):
        small.restore()
    with pytest.raises(DataError, match="not kept"):
        RunStore(tmp_path / "small").vectors(spec.key)
    large = RunStore(tmp_path / "large").run(spec.key)
    assert large.info["run_info"]["weights"] == "kept"
    assert large.restore()[2].adapter == spec.adapter


def test_run_without_a_store_writes_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    finished = run(make_spec(adapter=ht.HeadOnly()))
    assert finished.folder is None
    assert finished.attachment is not None
    assert finished.vectors() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(ArgumentError, match="was not written to a store"):
        finished.restore()


def test_run_needs_no_place_beside_the_backbone_nor_in_the_cache(
    make_spec: MakeSpec, backbone_folder: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in backbone_folder.iterdir())
    (tmp_path / "cache").mkdir()
    with read_only(backbone_folder, tmp_path / "cache"):
        run(make_spec(), tmp_path / "store")
    run(make_spec(seed=1), tmp_path / "store")
    assert sorted(path.name for path in backbone_folder.iterdir()) == before
    assert len(RunStore(tmp_path / "store")) == 2


def test_failure_is_recorded_raised_and_later_forgotten(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    spec, store = make_spec(), RunStore(tmp_path / "store")

    def diverge(*arguments: object, **settings: object) -> None:
        raise TrainingError(f"the loss became nan near {repository}{os.sep}hadamard_toolkit")

    with monkeypatch.context() as patch:
        patch.setattr("hadamard_toolkit.training.loop.train", diverge)
        with pytest.raises(TrainingError):
            run(spec, store)
    note = json.loads((store.folder / "failed" / f"{spec.key}.json").read_text())
    assert (note["error"], note["message"]) == ("TrainingError", "the loss became nan near hadamard_toolkit")
    assert f"hadamard_toolkit{os.sep}runs{os.sep}run.py:" in note["traceback"]
    assert "in diverge" in note["traceback"]
    assert note["schema"] == 1
    assert datetime.now(UTC) - datetime.fromisoformat(note["when"]) < timedelta(minutes=5)
    assert not any(line.startswith(os.sep) for line in note["traceback"].splitlines())
    assert RunSpec.from_dict(note["spec"]) == spec
    assert len(store) == 0
    assert list(store.failed()["message"]) == [note["message"]]
    run(spec, store)
    assert (len(store), len(store.failed())) == (1, 0)
    assert not list((store.folder / "failed").iterdir()), "the note is gone, not hidden"


def test_bad_specs_fail_with_one_clear_error(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no known task"):
        run(make_spec(task="ss2t"), tmp_path)
    with pytest.raises(ArgumentError, match=r"layers=\(9,\)"):
        run(make_spec(adapter=ht.Hadamard(layers=(9,))), tmp_path)
    with pytest.raises(ArgumentError, match="maskable='projections'"):
        run(make_spec(sparsity=Sparsity("snip", 0.5, examples=16, batch_size=16)), tmp_path)
    assert len(RunStore(tmp_path).failed()) == 3


@pytest.mark.parametrize(
    ("split", "rows", "subset", "expected"),
    [
        ("validation", 16, False, False),  # held out of the training split, so never all of it
        ("test", 40, False, False),
        ("test", 39, False, True),
        ("test_mismatched", 39, False, True),
        ("validation", 16, True, True),  # the data here are less than the official ones
        ("test", 40, True, True),
    ],
)
def test_a_score_on_less_than_the_official_rows_is_marked(
    split: str, rows: int, subset: bool, expected: bool
) -> None:
    parts = {split: {"rows": rows, "of": 40}}
    assert is_subset(split, {"rows": parts, "meta_info": {"task": {"subset": subset}}}) is expected


def test_names_of_adapters() -> None:
    stack = ht.Stack(ht.Hadamard(layers=(1,)), ht.LoRA(rank=4))
    assert method_name(stack) == "Hadamard+LoRA"
    assert label_of(ht.Hadamard()) == "Hadamard()"
    assert label_of(stack) == "Stack(adapters=(Hadamard(layers=(1,)), LoRA(rank=4)))"
    assert label_of(ht.Hadamard(norm=None, placement="attention_heads")) == (
        'Hadamard(placement="attention_heads", norm=None)'
    )


def test_metric_that_is_no_number_survives_as_nan(make_spec: MakeSpec, tmp_path: Path) -> None:
    finished: Run = run(make_spec(adapter=ht.HeadOnly()))
    finished.metrics["test"]["loss"] = float("nan")
    RunStore(tmp_path / "s").add(finished)
    text = (tmp_path / "s" / finished.key / "run.json").read_text()
    assert "NaN" not in text
    assert np.isnan(RunStore(tmp_path / "s").run(finished.key).metrics["test"]["loss"])


@pytest.mark.slow
def test_two_processes_leave_one_record(make_spec: MakeSpec, tmp_path: Path, repository: Path) -> None:
    spec = make_spec()
    small = ("epochs", "head_epochs", "train_rows", "validation_rows", "test_rows", "max_length")
    changes = [word for name in small for word in ("--set", f"{name}={getattr(spec.protocol, name)!r}")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "hadamard_toolkit.cli", "run", "--backbone", spec.backbone, "--task", spec.task),
            *("--protocol", "smoke", "--store", str(tmp_path / "store"), *changes),
        ],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore(tmp_path / "store")
    [key] = store.keys()
    assert store.run(key).info["train_info"]["processes"] == 2
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".staging")]
