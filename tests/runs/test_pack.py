from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.pack import pack, unpack
from hadamard_toolkit.runs.packed import Pack, read_folder, remove_packed, write_files
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep
from hadamard_toolkit.sparsity.spec import Sparsity

MakeSpec = Callable[..., RunSpec]
PLAN = """
[[grid]]
backbone = "{backbone}"
tasks = ["sst2"]
adapters = ["Hadamard()", 'LoRA(rank=2, init="normal")']
sparsity = {sparsity}
seeds = [0, 1]
protocol = "smoke"
overrides = {{ epochs = 1, head_epochs = 2, train_rows = 48, validation_rows = 16, test_rows = 40, max_length = 24 }}
"""


@pytest.fixture(scope="module")
def trained(
    backbone_folder: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A store with four runs in folders, two of them sparse, and a table measured on one; and the plan of them."""
    root = tmp_path_factory.mktemp("packing")
    plan = root / "small.toml"
    plan.write_text(PLAN.format(backbone=backbone_folder, sparsity='["None"]'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAMARD_DATA", str(data_root))
        patch.setenv("HADAMARD_CACHE", str(root / "cache"))
        dense = load_plan(plan)
        specs = [spec for spec in dense if type(spec.adapter) is ht.Hadamard]
        specs += [replace(spec, sparsity=Sparsity("magnitude", 0.5)) for spec in dense if spec not in specs]
        store = RunStore(root / "runs")
        for spec in specs:
            store.measured(run(spec, store).key, "made_up", lambda: pd.DataFrame({"layer": [0, 1]}))
    plan.write_text(
        PLAN.format(backbone=backbone_folder, sparsity='["None", \'Sparsity("magnitude", 0.5)\']')
    )
    return store.folder, plan


@pytest.fixture
def both(
    trained: tuple[Path, Path], data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunStore, RunStore, Path]:
    """The store in folders, a packed copy of it, and the plan."""
    folder, plan = trained
    monkeypatch.setenv("HADAMARD_DATA", str(data_root))
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "packed")
    pack(plan, tmp_path / "packed")
    return RunStore(folder), RunStore(tmp_path / "packed"), plan


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".claims" not in path.parts
    }


def test_packed_runs_are_read_like_folders(both: tuple[RunStore, RunStore, Path]) -> None:
    loose, packed, plan = both
    assert sorted(path.name for path in packed.folder.iterdir() if path.name != ".claims") == [
        "small.csv",
        "small.runs.parquet",
    ]
    assert packed.keys() == loose.keys()
    assert len(packed) == 4
    pd.testing.assert_frame_equal(packed.load(), loose.load())
    pd.testing.assert_frame_equal(packed.only(plan).wide(), loose.only(plan).wide())
    for key in sorted(loose.keys()):
        one, other = loose.run(key[:12]), packed.run(key[:12])
        assert other.to_record() == one.to_record()
        assert other.store == packed.folder
        pd.testing.assert_frame_equal(other.history, one.history)
        for split, arrays in one.predictions.items():
            for name, values in arrays.items():
                np.testing.assert_array_equal(other.predictions[split][name], values)
        assert packed.record(key) == loose.record(key)
        for name in ("run.json", "masks.safetensors", "measured/made_up.json", "measured/none.json"):
            assert packed.has(key, name) == loose.has(key, name)
        if one.spec.sparsity is None:
            for name, values in loose.vectors(key).items():
                np.testing.assert_array_equal(packed.vectors(key)[name], values)
        else:
            assert packed.masks(key).kept.keys() == loose.masks(key).kept.keys()
        restored = other.restore()[2].state_dict()
        for name, tensor in one.restore()[2].state_dict().items():
            np.testing.assert_array_equal(restored[name].numpy(), tensor.numpy())


def test_packed_runs_are_done(both: tuple[RunStore, RunStore, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loose, packed, _ = both
    monkeypatch.setattr("hadamard_toolkit.runs.run._train", lambda *_: pytest.fail("it was trained again"))
    specs = [loose.run(key).spec for key in sorted(loose.keys())]
    table = sweep(specs, packed)
    assert set(table["status"]) == {"present"}
    pd.testing.assert_frame_equal(table, sweep(specs, loose))
    assert run(specs[0], packed).key == specs[0].key


def test_packed_runs_on_another_backbone_are_found_and_left_to_be_unpacked(
    both: tuple[RunStore, RunStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed, _ = both
    assert packed.outdated().empty
    here = {"sha256": {"model.safetensors": "0" * 64}}
    monkeypatch.setattr("hadamard_toolkit.backbones.backbone_provenance", lambda name: here)
    assert packed.outdated()["key"].tolist() == packed.keys()
    with pytest.raises(DataError, match="made from other content"):
        run(packed.run(packed.keys()[0]).spec, packed)
    with pytest.raises(ArgumentError, match=r"is a packed run.*hadamard pack --undo"):
        packed.set_aside(packed.outdated()["key"])


def test_the_same_bytes_come_back(both: tuple[RunStore, RunStore, Path]) -> None:
    loose, packed, plan = both
    assert unpack(plan, packed) == loose.keys()
    assert contents(packed.folder) == contents(loose.folder)
    with pytest.raises(ArgumentError, match="was not packed"):
        unpack(plan, packed)


def test_packing_again_changes_nothing(both: tuple[RunStore, RunStore, Path], tmp_path: Path) -> None:
    loose, packed, plan = both
    before = contents(packed.folder)
    pack(plan, packed)
    assert contents(packed.folder) == before
    shutil.copytree(loose.folder, tmp_path / "again")  # and equal runs give equal bytes
    assert pack(plan, tmp_path / "again").read_bytes() == before["small.runs.parquet"]


def test_what_is_measured_on_a_packed_run_joins_it(both: tuple[RunStore, RunStore, Path]) -> None:
    _, packed, plan = both
    key = packed.keys()[0]
    table = packed.measured(key, "later", lambda: pd.DataFrame({"layer": [5]}))
    assert packed.measured(key, "later", lambda: pytest.fail("measured twice")).equals(table)
    assert packed.measured(key, "made_up", lambda: pytest.fail("measured twice"))["layer"].tolist() == [0, 1]
    assert len(packed.load()) == len(packed.only(plan).load()), "a folder with a table alone is no run"
    pack(plan, packed)
    assert not (packed.folder / key).exists()
    assert packed.measured(key, "later", lambda: pytest.fail("measured twice")).equals(table)
    unpack(plan, packed)
    assert (packed.folder / key / "measured" / "later.json").is_file()


def test_a_run_that_was_done_again_counts_first(both: tuple[RunStore, RunStore, Path]) -> None:
    loose, packed, plan = both
    key = packed.keys()[0]
    shutil.copytree(loose.folder / key, packed.folder / key)
    record = json.loads((packed.folder / key / "run.json").read_text())
    record["metrics"]["test"]["accuracy"] = 0.125
    (packed.folder / key / "run.json").write_text(json.dumps(record))
    assert packed.run(key).score == 0.125
    assert packed.record(key)["metrics"]["test"]["accuracy"] == 0.125
    shown = packed.load().query("key == @key and split == 'test' and headline")
    assert shown["value"].tolist() == [0.125]
    pack(plan, packed)
    assert packed.run(key).score == 0.125
    assert not (packed.folder / key).exists()


@pytest.mark.parametrize("after", range(4))
def test_killed_while_folders_go_every_run_is_whole(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder, plan = trained
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "runs")
    wanted, left, real = RunStore(folder).load(), [after], Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if len(path.parent.name) == 16:  # in the folder of a run
            left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            pack(plan, tmp_path / "runs")
    store = RunStore(tmp_path / "runs")
    pd.testing.assert_frame_equal(store.load(), wanted)
    assert [store.run(key).key for key in sorted(store.keys())] == sorted(set(wanted["key"]))
    pack(plan, store)
    assert [path.name for path in sorted(store.folder.glob("[!.]*"))] == ["small.csv", "small.runs.parquet"]
    pd.testing.assert_frame_equal(store.load(), wanted)


def test_nothing_goes_before_the_file_is_checked(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = trained
    shutil.copytree(folder, tmp_path / "runs")
    before = contents(tmp_path / "runs")
    monkeypatch.setattr(Pack, "files", lambda self: {})  # a disk that loses what it was given
    with pytest.raises(DataError, match="was not written as it should be"):
        pack(plan, tmp_path / "runs")
    assert contents(tmp_path / "runs") == before


def test_what_came_while_packing_stays(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = trained
    key = RunStore(folder).keys()[0]
    shutil.copytree(folder / key, tmp_path / key)
    packed = {path.name: path.read_bytes() for path in (tmp_path / key).iterdir() if path.is_file()}
    (tmp_path / key / "measured" / "later.json").write_text("{}")
    remove_packed(tmp_path / key, packed)
    assert set(contents(tmp_path / key)) == {"measured/made_up.json", "measured/later.json"}


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the packed file at `path` again, with every row changed; a changed content keeps its old checksum."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist([change(row) for row in table.to_pylist()], table.schema), path)


@pytest.mark.parametrize("damage", ["no parquet", "bytes lost", "other columns", "another format"])
def test_a_damaged_file_is_named_and_the_other_runs_are_read(
    both: tuple[RunStore, RunStore, Path], damage: str
) -> None:
    loose, packed, _ = both
    path, (key, other, *_) = packed.folder / "small.runs.parquet", loose.keys()
    shutil.copytree(loose.folder / key, packed.folder / key)
    content = path.read_bytes()
    if damage == "no parquet":
        path.write_text("no parquet at all")
    elif damage == "bytes lost":
        path.write_bytes(content[: len(content) // 2])
    else:
        table = pq.read_table(path)
        if damage == "other columns":
            table = table.append_column("more", pa.nulls(len(table), pa.string()))
        else:
            table = table.replace_schema_metadata({b"format": b"none"})
        pq.write_table(table, path)
    with pytest.raises(DataError, match=r"small\.runs\.parquet is no packed plan"):
        Pack(path)
    for read in (packed.keys, lambda: list(packed.load()["key"].unique())):
        with pytest.warns(UserWarning, match=r"skipped a packed file: .*small\.runs\.parquet.*; restore it"):
            assert read() == [key]
    assert packed.run(key).score == loose.run(key).score
    with (
        pytest.warns(UserWarning, match="skipped a packed file"),
        pytest.raises(ArgumentError, match="no run"),
    ):
        packed.run(other)


def test_one_damaged_record_of_a_packed_file_is_named_with_the_way_out(
    both: tuple[RunStore, RunStore, Path],
) -> None:
    loose, packed, _ = both
    path, (damaged, *others) = packed.folder / "small.runs.parquet", loose.keys()
    spec = loose.run(damaged).spec

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"content": b"{}"} if (row["key"], row["name"]) == (damaged, "run.json") else row

    rewritten(path, change)
    with pytest.warns(UserWarning, match=f"checksum of {damaged}/run.json is wrong"):
        assert sorted(packed.load()["key"].unique()) == others
    (row,) = sweep([spec], packed).itertuples()
    assert row.status == "failed"
    assert f"restore the packed file {path} (git restore, or a copy of yours)" in row.reason
    assert "hadamard pack --undo small.toml" in row.reason
    assert f"remove the folder {packed.folder / damaged}" in row.reason
    with pytest.raises(DataError, match=r"small\.runs\.parquet is damaged"):
        packed.run(others[0])  # nothing is unpacked from a file whose content is not what it was


@pytest.mark.parametrize("column", ["key", "name"])
def test_a_packed_file_writes_nothing_outside_of_its_runs(
    both: tuple[RunStore, RunStore, Path], column: str
) -> None:
    _, packed, _ = both
    rewritten(packed.folder / "small.runs.parquet", lambda row: row | {column: "../elsewhere"})
    with pytest.raises(DataError, match=r"elsewhere.* is no file of a run"):
        Pack(packed.folder / "small.runs.parquet").files()


def test_without_a_cache_to_write_packed_runs_are_read_all_the_same(
    both: tuple[RunStore, RunStore, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed, _ = both
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "file" / "cache"))
    assert packed.run(packed.keys()[0]).score >= 0


def test_the_command_packs_and_unpacks(
    both: tuple[RunStore, RunStore, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    loose, packed, plan = both
    assert main(["pack", str(plan), "--undo", "--store", str(packed.folder)]) == 0
    assert capsys.readouterr().out.startswith("4 runs back in folders")
    assert contents(packed.folder) == contents(loose.folder)
    assert main(["pack", str(plan), "--store", str(packed.folder)]) == 0
    assert "small.runs.parquet" in capsys.readouterr().out
    assert packed.keys() == loose.keys()


def test_a_run_of_two_plans_is_packed_once(both: tuple[RunStore, RunStore, Path], tmp_path: Path) -> None:
    loose, packed, plan = both
    other = plan.with_name("other.toml")
    shutil.copy(plan, other)
    with pytest.raises(ArgumentError, match="not packed elsewhere"):
        pack(other, packed)
    assert len(packed) == len(loose)


def test_of_two_packed_files_with_a_run_the_first_by_name_counts(
    both: tuple[RunStore, RunStore, Path],
) -> None:
    _, packed, _ = both
    key = packed.keys()[0]

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if (row["key"], row["name"]) != (key, "run.json"):
            return row
        record = json.loads(row["content"])
        record["metrics"]["test"]["accuracy"] = 0.125
        content = json.dumps(record).encode()
        return row | {"content": content, "sha256": hashlib.sha256(content).hexdigest()}

    shutil.copy(packed.folder / "small.runs.parquet", packed.folder / "a.runs.parquet")
    rewritten(packed.folder / "a.runs.parquet", change)
    assert packed.record(key)["metrics"]["test"]["accuracy"] == 0.125
    assert packed.wide().loc[key, "test/accuracy"] == 0.125
    assert packed.run(key).score == 0.125


def test_files_in_folders_of_a_run_are_written_in_any_order(tmp_path: Path) -> None:
    files = {("a" * 16, "answers/test.json"): b"{}", ("a" * 16, "run.json"): b"[]"}
    write_files(files, tmp_path)
    assert {
        ("a" * 16, name): content for name, content in read_folder(tmp_path / ("a" * 16)).items()
    } == files
