"""A retraining in another process: its progress, its end, its failure, and what cancelling leaves."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import retrain as module
from hadamard_toolkit.widgets.retrain import Retraining, RetrainingError


def test_cancelling_leaves_no_half_written_run(tiny_spec: RunSpec, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    job = Retraining(replace(tiny_spec, protocol=replace(tiny_spec.protocol, epochs=5000)), store)
    until = time.monotonic() + 120
    while job.progress[0] != "stage two" and time.monotonic() < until:
        assert not job.finished
        time.sleep(0.05)
    assert job.progress[0] == "stage two"
    job.cancel()
    assert job.finished
    assert job.result() is None
    assert store.keys() == []
    assert not list(tmp_path.glob(".staging-*"))
    with store.claim(job.spec) as mine:
        assert mine, "nobody holds the run any more"


def test_cancelling_removes_what_was_being_written_and_nothing_else(
    tiny_spec: RunSpec, tmp_path: Path
) -> None:
    job = Retraining(tiny_spec, RunStore(tmp_path))
    own, other = (tmp_path / f".staging-{process}-run" for process in (job._process.pid, 1))
    for folder in (own, other):  # as they stand when the process is ended between two of its files
        folder.mkdir()
        (folder / "history.jsonl").write_text("{}")
    job.cancel()
    assert not own.exists()
    assert (other / "history.jsonl").exists()


def test_a_failure_says_why(tiny_spec: RunSpec, tmp_path: Path) -> None:
    job = Retraining(
        replace(tiny_spec, protocol=replace(tiny_spec.protocol, train_rows=10_000)), RunStore(tmp_path)
    )
    with pytest.raises(RetrainingError, match=r"train_rows=10000.*ask for fewer"):
        job.result()
    job.cancel()
    assert not job.cancelled, "it had ended before"


def test_a_process_that_does_not_end_by_itself_is_killed(
    tiny_spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    job = Retraining(tiny_spec, RunStore(tmp_path))
    os.kill(job._process.pid, signal.SIGSTOP)  # what stands still does not see that it is to end
    job.cancel()
    assert job.finished
    assert job.result() is None
