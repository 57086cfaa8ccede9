from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import ROLES
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec, key_of
from hadamard_toolkit.runs.store import COLUMNS, RunStore
from hadamard_toolkit.runs.sweep import sweep
from hadamard_toolkit.runs.table import ROLES as TABLE_ROLES
from tests.runs.conftest import copies

MakeSpec = Callable[..., RunSpec]


def test_empty_store_is_an_empty_table(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "none yet")
    assert (len(store), store.keys()) == (0, [])
    assert store.failed().empty
    for read in (store.load, store.wide):  # a name with a slip must not pass for a store without runs
        with pytest.raises(DataError, match=r"none yet' is not there"):
            read()
    assert not store.folder.exists()
    store.folder.mkdir()
    assert list(store.load().columns) == list(COLUMNS)
    assert store.load().empty
    assert store.wide().empty
    with pytest.raises(ArgumentError, match="folder='' is not allowed"):
        RunStore("")  # would be the working folder
    with pytest.raises(ArgumentError, match="it is a file"):
        RunStore(Path(__file__))
    with pytest.raises(ArgumentError, match=r"test_store.py is a file, and a store is a folder"):
        RunStore(Path(__file__) / "deep" / "runs")


def test_load_is_tidy(done: RunStore, make_spec: MakeSpec) -> None:
    table = done.load()
    spec = make_spec()
    assert sorted(zip(table["split"], table["metric"], strict=True)) == [
        ("test", "accuracy"),
        ("test", "loss"),
        ("validation", "accuracy"),
        ("validation", "loss"),
    ]
    assert set(table.loc[table["headline"], "metric"]) == {"accuracy"}
    test = table[table["headline"] & (table["split"] == "test")].iloc[0]
    assert test[["key", "task", "method", "label", "head_policy", "seed"]].tolist() == [
        spec.key,
        "sst2",
        "Hadamard",
        "Hadamard()",
        "first-then-frozen",
        0,
    ]
    assert (test["n"], test["train_rows"], test["subset"]) == (40, 48, True)
    assert (test["trained"], test["trained_with_head"], test["trained_norm"]) == (192, 226, 96)
    assert json.loads(test["adapter"]) == spec.to_dict()["adapter"]
    assert json.loads(test["protocol"]) == spec.to_dict()["protocol"]
    assert test["value"] == done.run(spec.key).score
    assert test["seconds"] > 0


def test_the_table_counts_every_role_of_a_parameter() -> None:
    assert TABLE_ROLES == ROLES
    assert {f"stored_{role}" for role in ROLES} < set(COLUMNS)


def test_wide_has_a_row_per_run(done: RunStore) -> None:
    specs = copies(done, 3)
    wide = done.wide()
    assert len(wide) == 4
    assert wide.loc[specs[1].key, "test/accuracy"] == 0.002
    assert wide.loc[specs[1].key, "seed"] == 2
    assert {"validation/accuracy", "validation/loss", "test/loss"} <= set(wide.columns)


def test_keys_may_be_cut_short_while_they_are_unique(done: RunStore) -> None:
    (key,) = done.keys()
    assert done.run(key[:6]).key == key
    assert key in done
    assert key[:6] not in done
    copies(done, 40)
    assert list(done.load()["key"].unique()) == sorted(done.keys())
    keys = done.keys()
    several = next(prefix for prefix in "0123456789abcdef" if sum(k.startswith(prefix) for k in keys) > 1)
    with pytest.raises(ArgumentError, match="give more of it"):
        done.run(several)
    for absent in ("", "not a key", "../" + key):
        with pytest.raises(ArgumentError, match=r"is no run of|give more of it"):
            done.run(absent)


@pytest.mark.parametrize(
    "damage",
    [
        *("empty", "no json", "foreign", "schema", "edited", "incomplete", "renamed", "missing"),
        *("metric in words", "metrics in a list", "no test score", "no time"),
    ],
)
def test_damaged_folder_is_skipped_by_name_and_refused_when_asked_for(done: RunStore, damage: str) -> None:
    (spec,) = copies(done, 1)
    folder = done.folder / spec.key
    record = json.loads((folder / "run.json").read_text())
    if damage == "empty":
        (folder / "run.json").write_text("")
    elif damage == "no json":
        (folder / "run.json").write_text('{"key": ')
    elif damage == "foreign":
        (folder / "run.json").write_text("[1, 2]")
    elif damage == "schema":
        (folder / "run.json").write_text(json.dumps(record | {"schema": 99}))
    elif damage == "edited":
        record["spec"]["seed"] = 77
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "incomplete":
        del record["metrics"]
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "metric in words":
        record["metrics"]["test"]["loss"] = "low"
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "metrics in a list":
        record["metrics"] = [1]
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "no test score":
        del record["metrics"]["test"]["accuracy"]
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "no time":
        record["times"]["total"] = "a minute"
        (folder / "run.json").write_text(json.dumps(record))
    elif damage == "renamed":
        folder = folder.rename(done.folder / "0123456789abcdef")
    else:
        (folder / "run.json").unlink()
    with pytest.warns(UserWarning, match=folder.name):
        table = done.load()
    assert table["key"].nunique() == 1
    with pytest.raises((DataError, ArgumentError), match=folder.name):
        done.run(folder.name)


def test_damaged_predictions_are_named(done: RunStore) -> None:
    (key,) = done.keys()
    (done.folder / key / "predictions.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match=f"{key} is damaged"):
        done.run(key)


def test_many_runs_load_quickly(done: RunStore) -> None:
    copies(done, 200)
    begun = time.perf_counter()
    table = done.load()
    assert time.perf_counter() - begun < 2  # 1,000 take well under a second on one core
    assert table["key"].nunique() == 201
    scores = table[(table["split"] == "test") & (table["metric"] == "accuracy") & (table["seed"] > 0)]
    np.testing.assert_array_equal(scores["value"], scores["seed"] / 1000)


def test_two_readers_agree(done: RunStore) -> None:
    copies(done, 5)
    pd.testing.assert_frame_equal(done.load(), RunStore(str(done.folder)).load())


def test_a_store_of_vectors_keeps_masks_but_no_matrices(tmp_path: Path, make_spec: MakeSpec) -> None:
    store = RunStore(tmp_path, keep="vectors")
    sparse = make_spec(adapter=ht.Pfeiffer(bottleneck=4, init="normal"), sparsity=ht.Sparsity("random", 0.5))
    small = make_spec()
    for spec in (sparse, small):
        run(spec, store)
    assert store.masks(sparse.key).density == pytest.approx(0.5, abs=0.01)
    with pytest.raises(DataError, match=r'vectors only.*keep="adapters"'):
        store.run(sparse.key).restore()
    assert store.vectors(small.key)
    with pytest.raises(ArgumentError, match=r"keep='all'.*vectors"):
        RunStore(tmp_path, keep="all")


def test_what_was_measured_on_a_run_is_measured_once_and_read_back(
    tmp_path: Path, make_spec: MakeSpec
) -> None:
    store, spec, asked = RunStore(tmp_path), make_spec(), []
    run(spec, store)

    def measure() -> pd.DataFrame:
        asked.append(1)
        return pd.DataFrame(
            {"layers": ["0", "0,1", ""], "n": [1, 2, 3], "score": [0.25, float("nan"), 1 / 3]}
        )

    first = store.measured(spec.key, "removal", measure)
    again = store.measured(spec.key[:8], "removal", measure)
    assert len(asked) == 1
    pd.testing.assert_frame_equal(first, again)
    assert first["layers"].tolist() == ["0", "0,1", ""]
    assert first["n"].sum() == 6
    assert first["score"].tolist()[::2] == pytest.approx([0.25, 1 / 3])
    assert first["score"].isna().sum() == 1
    assert store.keys() == [spec.key]
    with pytest.raises(ArgumentError, match="is no run"):
        store.measured("feed", "removal", measure)


def test_a_part_of_a_store_is_a_store(done: RunStore, make_spec: MakeSpec, tmp_path: Path) -> None:
    first, *_ = copies(done, 3)
    part = done.only([make_spec(), replace(make_spec(), seed=99)])  # the second is not there
    assert len(done) == 4
    assert part.keys() == [make_spec().key]
    assert set(part.load()["key"]) == {make_spec().key}
    assert first not in part
    assert first in done
    with pytest.raises(ArgumentError, match="is no run"):
        part.run(first.key)
    assert done.only([first.key[:10]]).keys() == [first.key]
    plan = tmp_path / "plan.toml"
    plan.write_text('[[grid]]\ntasks = ["sst2"]\nadapters = ["Hadamard"]\nprotocol = "hadamard"\n')
    assert done.only(plan).keys() == []
    other = replace(make_spec(), seed=99)
    for spec in (other, replace(make_spec(), seed=98)):
        done.add_failure(spec, ValueError("no"))
    assert len(done.failed()) == 2
    assert part.failed()["key"].tolist() == [other.key]


def test_a_run_recorded_under_another_spelling_of_its_folder_is_present(
    done: RunStore, make_spec: MakeSpec, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions recorded the folder as the caller spelled it."""
    (key,) = done.keys()
    record = json.loads((done.folder / key / "run.json").read_text())
    record["spec"]["backbone"] = "tiny/"
    record["key"] = key_of(record["spec"])
    (done.folder / key / "run.json").write_text(json.dumps(record))
    (done.folder / key).rename(done.folder / record["key"])
    monkeypatch.chdir(backbone_folder.parent)
    monkeypatch.setattr("hadamard_toolkit.runs.run._train", lambda *_: pytest.fail("trained again"))
    spec = make_spec(backbone="tiny/")
    assert spec == make_spec()
    assert run(spec, done).key == record["key"]
    table = sweep([spec], done)
    assert table[["key", "status"]].iloc[0].tolist() == [record["key"], "present"]
    assert done.only([spec]).keys() == [record["key"]]
    assert done.outdated().empty
