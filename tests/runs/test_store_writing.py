"""Writing to a store: claims, killed processes, full disks, notes of failed runs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, StoreError
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

MakeSpec = Callable[..., RunSpec]


def test_only_one_holds_a_claim(done: RunStore, make_spec: MakeSpec) -> None:
    spec, other = make_spec(), make_spec(seed=1)
    again = RunStore(done.folder)
    with done.claim(spec) as mine:
        assert mine
        with again.claim(spec) as theirs, again.claim(other) as free:
            assert (theirs, free) == (False, True)
    with again.claim(spec) as after:
        assert after


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """A Python process; `ready` on its stdout says that it has come as far as it should."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


CLAIMING = """
import sys, time, types
from hadamard_toolkit.runs.store import RunStore
with RunStore(sys.argv[1]).claim(types.SimpleNamespace(key="KEY")) as mine:
    print("ready", mine, flush=True)
    time.sleep(60)
"""


def test_claim_dies_with_its_process(done: RunStore, make_spec: MakeSpec) -> None:
    spec = make_spec()
    process = start(CLAIMING.replace("KEY", spec.key), done.folder)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready True\n"
        with done.claim(spec) as mine:
            assert not mine
        process.send_signal(signal.SIGKILL)
        process.wait()
        with done.claim(spec) as mine:
            assert mine
    finally:
        process.kill()
        process.communicate()


# A run that is killed between two of its files: everything is written but run.json, which never comes.
HALF_WRITING = """
import sys, time
from pathlib import Path
from hadamard_toolkit.paths import atomic_folder
with atomic_folder(Path(sys.argv[1]) / "0123456789abcdef") as staging:
    (staging / "history.jsonl").write_text("{}")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killed_run_leaves_no_half_written_folder(done: RunStore, make_spec: MakeSpec) -> None:
    process = start(HALF_WRITING, done.folder)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.communicate()
    (left,) = done.folder.glob(".staging-*")
    before = done.load()
    assert (len(done), before["key"].nunique()) == (1, 1)  # no warning either
    mine = done.folder / f".staging-{os.getpid()}-mine"
    mine.mkdir()
    run(make_spec(adapter=ht.HeadOnly()), done)
    assert left.exists()  # too young to judge: its process may live on another machine
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    os.utime(mine, (long_ago, long_ago))
    run(make_spec(adapter=ht.HeadOnly(), seed=1), done)
    assert not left.exists()
    assert mine.exists()  # its process is alive
    assert len(done) == 3


def test_failed_write_leaves_nothing(
    done: RunStore, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(done.folder.iterdir())

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    finished = run(make_spec(seed=1))
    monkeypatch.setattr("hadamard_toolkit.runs.record.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        done.add(finished)
    assert sorted(done.folder.iterdir()) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"spec": "sst2"}', "\ufffd"])
def test_note_that_cannot_be_read_is_skipped_by_name(make_spec: MakeSpec, tmp_path: Path, text: str) -> None:
    store = RunStore(tmp_path)
    store.add_failure(make_spec(), ValueError("no"))
    (tmp_path / "failed" / "0123456789abcdef.json").write_text(text)
    with pytest.warns(UserWarning, match=r"skipped .*0123456789abcdef\.json"):
        assert store.failed()["message"].tolist() == ["no"]


def in_the_way(tmp_path: Path) -> RunStore:
    """A store whose folder cannot be made, whoever tries: a file came to lie on the path to it."""
    store = RunStore(tmp_path / "place" / "runs")
    store.folder.parent.write_text("")
    return store


def test_store_that_cannot_be_written_to_says_so(make_spec: MakeSpec, tmp_path: Path) -> None:
    store = in_the_way(tmp_path)
    with pytest.raises(StoreError, match=r"place/runs' cannot be written to: Not a directory"):
        store.check_writable()
    with pytest.raises(StoreError, match="cannot be written to"), store.claim(make_spec()):
        pytest.fail("claimed all the same")
    with pytest.warns(UserWarning, match=r"failed/.*cannot be written"):
        store.add_failure(make_spec(), ValueError("no"))


def test_full_disk_is_found_before_it_is_needed(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = RunStore(tmp_path / "runs")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(StoreError, match=r"runs' cannot be written to: File too large"):
            store.check_writable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.check_writable()
    assert not list(store.folder.iterdir())


def test_what_was_measured_comes_back_although_it_cannot_be_kept(
    done: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = done.keys()
    (done.folder / key / "measured").write_text("in the way")
    with pytest.warns(UserWarning, match="gates is not kept"):
        found = done.measured(key, "gates", lambda: pd.DataFrame({"layer": [0, 1]}))
    assert found["layer"].tolist() == [0, 1]


def test_a_run_that_was_read_cannot_be_written_again(done: RunStore, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="only a freshly trained run can be written"):
        RunStore(tmp_path / "other").add(done.run(done.keys()[0]))


def test_a_run_that_cannot_be_moved_aside_says_so(done: RunStore) -> None:
    (done.folder / "aside").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot be written to: File exists"):
        done.set_aside(done.keys())
    assert len(done.keys()) == 1
