from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, StoreError
from hadamard_toolkit.runs import engines as module
from hadamard_toolkit.runs.engines import Attempt, attempt_run
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep

MakeSpec = Callable[..., RunSpec]
BROKEN = ht.Hadamard(layers=(9,))  # the tiny backbone has three layers


def test_sweep_does_what_is_missing_and_goes_on_after_a_failure(make_spec: MakeSpec, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    sweep([make_spec()], store)
    specs = [make_spec(adapter=BROKEN), make_spec(), make_spec(seed=1), make_spec(seed=1)]
    lines: list[str] = []
    table = sweep(iter(specs), store, report=lines.append)
    assert table["status"].tolist() == ["failed", "present", "done"]
    assert table["key"].tolist() == [spec.key for spec in specs[:3]]
    assert "layers=(9,) is not allowed" in table["reason"][0]
    assert table["score"][1:].between(0, 1).all()
    assert table["score"].isna()[0]
    assert len(store) == 2
    assert store.failed()["key"].tolist() == [specs[0].key]
    assert lines[0].startswith(
        f"[1/2] {specs[0].key} sst2 Hadamard(layers=(9,)) seed 0 failed: ArgumentError"
    )
    assert "left)" in lines[0]
    line = rf"\[2/2\] {specs[2].key} sst2 Hadamard\(\) seed 1 done \(\d+\.\d\d runs per minute\)"
    assert re.fullmatch(line, lines[1])


def test_failed_run_is_tried_again(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter=ht.HeadOnly())
    with monkeypatch.context() as patch:
        patch.setenv("HADAMARD_DATA", str(tmp_path / "nowhere"))
        assert sweep([spec], tmp_path)["status"].tolist() == ["failed"]
    assert sweep([spec], tmp_path)["status"].tolist() == ["done"]
    assert sweep([spec], tmp_path)["status"].tolist() == ["present"]
    assert RunStore(tmp_path).failed().empty


def test_run_in_other_hands_is_left_alone(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = RunStore(tmp_path), make_spec()
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("done twice"))
    with store.claim(spec):
        table = sweep([spec], RunStore(tmp_path))
    assert table["status"].tolist() == ["elsewhere"]


def test_run_finished_while_we_waited_is_not_done_again(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = RunStore(tmp_path), make_spec(adapter=ht.HeadOnly())
    assert attempt_run(spec, store).status == "done"
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("done twice"))
    assert attempt_run(spec, store) == Attempt(spec, "done")


def test_interrupt_stops_the_sweep_and_keeps_what_is_done(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = RunStore(tmp_path), module.run

    def interrupted(spec: RunSpec, store: RunStore) -> Any:
        if spec.seed == 1:
            raise KeyboardInterrupt
        return real(spec, store)

    monkeypatch.setattr(module, "run", interrupted)
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in range(3)]
    with pytest.raises(KeyboardInterrupt):
        sweep(specs, store)
    assert store.keys() == [specs[0].key]
    assert store.failed().empty
    with store.claim(specs[1]) as mine:
        assert mine


def test_store_that_cannot_be_written_to_is_one_error_before_the_first_run(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("trained all the same"))
    store = RunStore(tmp_path / "place" / "runs")
    store.folder.parent.write_text("a file that came in the way")
    for engine in ("inline", "processes"):
        with pytest.raises(StoreError, match=r"place/runs' cannot be written to"):
            sweep([make_spec()], store, engine=engine)
    assert attempt_run(make_spec(), store).reason.startswith("StoreError: store=")


def test_present_runs_are_told_of_a_store_that_is_only_read(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep([make_spec()], tmp_path)
    monkeypatch.setattr(RunStore, "check_writable", lambda store: pytest.fail("nothing is to be written"))
    assert sweep([make_spec()], tmp_path)["status"].tolist() == ["present"]


@pytest.mark.parametrize("damage", ["", "[]", "metric"])
def test_damaged_record_is_named_and_the_other_runs_are_done(
    make_spec: MakeSpec, tmp_path: Path, damage: str
) -> None:
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (0, 1)]
    sweep(specs[:1], tmp_path)
    record = tmp_path / specs[0].key / "run.json"
    good = record.read_text()
    if damage == "metric":
        found = json.loads(good)
        found["metrics"]["test"]["accuracy"] = "high"
        damage = json.dumps(found)
    record.write_text(damage)
    lines: list[str] = []
    table = sweep(specs, tmp_path, report=lines.append)
    assert table["status"].tolist() == ["failed", "done"]
    assert specs[0].key in table["reason"][0]
    assert "DataError: run.json in" in table["reason"][0]
    assert table["reason"][0].endswith("to do the run again")
    assert table["reason"][0] in lines[0]
    assert table["score"].isna().tolist() == [True, False]
    assert record.read_text() == damage  # it may still be mended by hand


def test_run_that_cannot_be_written_is_saved_to_a_place_that_is_named(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec, real = RunStore(tmp_path / "runs"), make_spec(adapter=ht.HeadOnly()), RunStore.add
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(self: RunStore, done: Run) -> Run:
        if self.folder == store.folder:
            raise OSError(28, "No space left on device")
        return real(self, done)

    monkeypatch.setattr(RunStore, "add", full)
    (reason,) = sweep([spec], store)["reason"]
    assert "No space left on device" in reason
    saved = Path(reason.split("; it is saved in ")[1])
    assert RunStore(saved.parent).run(spec.key).score == real(store, run(spec)).score


def test_bad_arguments_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="engine='dask' is not allowed"):
        sweep([], tmp_path, engine="dask")
    with pytest.raises(ArgumentError, match="workers=2"):
        sweep([], tmp_path, workers=2)
    with pytest.raises(ArgumentError, match="workers=0"):
        sweep([], tmp_path, engine="processes", workers=0)
    with pytest.raises(ArgumentError, match="must be a RunSpec"):
        sweep(["sst2"], tmp_path)  # type: ignore[list-item]
    assert sweep([], tmp_path).empty
