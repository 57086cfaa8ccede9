from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit import cli
from hadamard_toolkit.adapters.bases import load_basis
from hadamard_toolkit.errors import ArgumentError, DataError, StoreError, ToolkitError
from hadamard_toolkit.paths import PREPARED, place_in
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.prepared import MANIFEST, _tasks_of, prepare, use_prepared
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks.files import write_task
from tests.architectures import tiny_basis
from tests.permissions import read_only
from tests.runs.conftest import PROTOCOL
from tests.training.test_question_answering import span_task
from tests.training.tiny import tiny_task

MakeSpec = Callable[..., RunSpec]
ELSEWHERE = """
import socket, sys
from hadamard_toolkit import cli

def refuse(*_, **__):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = refuse
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def plan(make_spec: MakeSpec, backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a backbone in a folder that can be taken away."""
    monkeypatch.delenv(PREPARED, raising=False)
    shutil.copytree(backbone_folder, tmp_path / "models" / "tiny")
    (tmp_path / "models" / "tiny" / "pytorch_model.bin").write_bytes(b"never opened")
    path = tmp_path / "my plan.toml"
    path.write_text(f"""
[[grid]]
backbone = "{tmp_path / "models" / "tiny"}"
tasks = ["sst2"]
adapters = ["Hadamard()"]
seeds = [0, 1]
protocol = "smoke"
overrides = {{ epochs = 1, head_epochs = 1, train_rows = 32, validation_rows = 16, max_length = 24 }}
""")
    return path


def test_a_prepared_folder_is_all_that_another_machine_needs(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = RunStore(tmp_path / "here"), RunStore(tmp_path / "there")
    specs = load_plan(plan)
    ht.sweep(specs, here)
    assert cli.main(["prepare", str(plan), str(tmp_path / "folder")]) == 0
    *files, size, advice = capsys.readouterr().out.splitlines()
    assert not any("pytorch_model.bin" in line for line in files)
    assert size.endswith(f"MB  in {len(files)} files, with their SHA-256 in a manifest")
    assert advice.endswith(f"there: hadamard sweep {tmp_path / 'folder'}/plan.toml")
    shutil.rmtree(tmp_path / "models")
    (tmp_path / "folder").rename(tmp_path / "carried")

    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HADAMARD_DATA": str(tmp_path / "nothing"), "HADAMARD_CACHE": str(tmp_path / "empty")}
    command = ["sweep", tmp_path / "carried" / "plan.toml", "--minutes", "10", "--store", there.folder]
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.splitlines()[-1:] == ["2 done"], finished.stdout + finished.stderr
    assert "prepared folder, which is whole" in finished.stdout
    manifest = json.loads((tmp_path / "carried" / MANIFEST).read_text())
    now = {path for path in (tmp_path / "carried").rglob("*") if path.is_file()}
    assert now == {tmp_path / "carried" / file for file in (*manifest, MANIFEST)}, "nothing was written there"
    assert there.keys() == here.keys() == sorted(spec.key for spec in specs)
    for key in here.keys():  # noqa: SIM118, a store is no dictionary
        one, other = here.run(key), there.run(key)
        assert one.metrics == other.metrics
        assert one.info["meta_info"] == other.info["meta_info"]
        for split, arrays in one.predictions.items():
            assert all(
                np.array_equal(array, other.predictions[split][name]) for name, array in arrays.items()
            )
        file = "adapter_model.safetensors"
        assert (here.folder / key / file).read_bytes() == (there.folder / key / file).read_bytes()


@pytest.mark.parametrize(
    "task",
    [tiny_task(train=12, test=5, test_other=4), tiny_task("regression", train=12), span_task(12, 5)],
    ids=lambda task: task.kind,
)
def test_a_task_comes_back_from_its_files(
    task: ht.Task, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(task, place_in(tmp_path, "tasks", "embedded/word-order"))
    monkeypatch.setenv(PREPARED, str(tmp_path))
    again = ht.load_task("embedded/Word-Order")
    assert again.content() == task.content()
    for name in ("name", "text_columns", "kind", "labels", "metric", "metrics", "provenance"):
        assert getattr(again, name) == getattr(task, name)
    for split, rows in task.splits.items():
        assert again.splits[split].features == rows.features
        assert again.splits[split][:] == rows[:]
    write_task(task, place_in(tmp_path, "tasks", "rte"))
    with pytest.raises(DataError, match="task 'rte' was not found"):
        ht.load_task("rte", root=tmp_path)  # a place that is named is the only one asked
    assert ht.load_task("sst2").provenance["rows"] == {"train": 96, "test": 40}, "others are where they were"


def test_the_tasks_of_fusions_and_of_pretraining_are_gathered(make_spec: MakeSpec) -> None:
    fusion = make_spec(adapter=ht.AdapterFusion(("sst2", "rte")))
    assert _tasks_of(fusion) == ["sst2", "sst2", "rte"]
    steps = tuple(
        ht.protocols.tapt() if text == "task" else ht.protocols.dapt(text) for text in ("cs", "task")
    )
    assert _tasks_of(make_spec(protocol=replace(PROTOCOL, pretraining=steps))) == [
        "sst2",
        "acl-arc",
        "scierc",
    ]


def changed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


ROWS = "tasks/sst2/train.parquet"
DAMAGE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "a missing file": (ROWS, "missing", Path.unlink),
    "a shorter file": (ROWS, "damaged", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a changed file": (ROWS, "damaged", changed),
    "another plan": ("plan.toml", "damaged", changed),
    "half a manifest": (MANIFEST, "damaged", lambda path: path.write_text(path.read_text()[:99])),
    "a manifest of nothing": (MANIFEST, "damaged", lambda path: path.write_text("{}")),
    "no manifest": (MANIFEST, "damaged", lambda path: path.write_text("[]")),
}


def test_the_bases_of_subspaces_are_gathered(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = tiny_basis()
    subspace = f'Subspace(Hadamard(norm=None), basis="{basis}", k=2)'
    plan.write_text(
        plan.read_text().replace('"Hadamard()"', f"'{subspace}', 'Stack({subspace}, LayerNormTuning())'")
    )
    files = prepare(plan, tmp_path / "folder")["file"].tolist()
    assert f"bases/{basis}/{basis}.safetensors" in files
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ArgumentError, match=basis):
        load_basis(basis)
    monkeypatch.setenv(PREPARED, str(tmp_path / "folder"))
    assert load_basis(basis).made == {"kind": "random", "seed": 0}
    changed(tmp_path / "folder" / "bases" / basis / f"{basis}.safetensors")
    with pytest.raises(DataError, match="is damaged"):
        prepare(plan, tmp_path / "again")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_not_whole_is_one_error_before_the_first_run(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder, (file, state, harm) = tmp_path / "folder", DAMAGE[damage]
    prepare(plan, folder)
    harm(folder / file)
    assert cli.main(["sweep", str(folder / "plan.toml"), "--store", str(tmp_path / "store")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{folder} is not as it was prepared: {file} is {state} (1 of " in err
    assert PREPARED not in os.environ


def test_other_plans_are_not_touched(plan: Path) -> None:
    assert not use_prepared(plan)
    assert PREPARED not in os.environ


def test_only_a_prepared_folder_is_replaced(plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    first = prepare(plan, folder)
    assert prepare(plan, folder).equals(first)
    assert json.loads((folder / MANIFEST).read_text()).keys() == set(first["file"])
    (folder / MANIFEST).unlink()
    for target in (folder, plan):
        with pytest.raises(ArgumentError, match="holds something else"):
            prepare(plan, target)
    assert (folder / "plan.toml").is_file()


def test_a_backbone_must_mean_the_same_on_the_other_machine(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan.write_text(plan.read_text().replace(str(tmp_path / "models"), "models"))
    with pytest.raises(ArgumentError, match=r"backbone='models/tiny' .* so write '/.*/models/tiny'"):
        prepare(plan, "folder")
    assert not Path("folder").exists()


def test_a_place_that_cannot_be_written_to(plan: Path, tmp_path: Path) -> None:
    with read_only(tmp_path / "models"), pytest.raises(StoreError, match="cannot be written to"):
        prepare(plan, tmp_path / "models" / "folder")


def test_missing_data_are_said_and_leave_nothing(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="task 'sst2' was not found") as caught:
        prepare(plan, tmp_path / "folder")
    assert isinstance(caught.value, ToolkitError)
    assert not list(tmp_path.glob("*folder*"))
    assert not list(tmp_path.glob(".staging*"))
