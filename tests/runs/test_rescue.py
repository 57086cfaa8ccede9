from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import StoreError
from hadamard_toolkit.runs import run as module
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import UnsavedRunError, rescue, run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

MakeSpec = Callable[..., RunSpec]


def full(self: RunStore, done: Run) -> Run:
    raise OSError(28, "No space left on device")


def test_nothing_is_trained_for_a_store_that_cannot_be_written_to(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_train", lambda *arguments: pytest.fail("trained all the same"))
    store = RunStore(tmp_path / "place" / "runs")
    store.folder.parent.write_text("a file that came in the way")
    with pytest.raises(StoreError, match=r"place/runs' cannot be written to"):
        run(make_spec(), store)


def test_a_trained_run_that_cannot_be_written_comes_with_the_error(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = RunStore(tmp_path / "runs"), make_spec(adapter=ht.HeadOnly())
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "add", full)
        with pytest.raises(UnsavedRunError, match=rf"{spec.key} is trained.*No space left") as caught:
            run(spec, store)
    done = caught.value.run
    assert isinstance(caught.value, StoreError)
    assert done.attachment is not None
    assert store.failed().empty  # the run did not fail
    assert spec not in store
    assert store.add(done).score == run(spec).score


def test_rescue_writes_the_run_elsewhere_whatever_error_carries_it(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter=ht.HeadOnly())
    unsaved = UnsavedRunError(run(spec), RunStore(tmp_path / "runs", keep="nothing"), OSError("full"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        raise ValueError("a source failed") from unsaved
    except ValueError as error:
        folder = rescue(error)
    assert folder is not None
    assert folder.parent.name.startswith("hadamard-unsaved-")
    assert RunStore(folder.parent).keys() == [spec.key]
    assert not (folder / "adapter_model.safetensors").exists()  # kept as the store would have kept it
    assert rescue(ValueError("no run")) is None
    monkeypatch.setattr(RunStore, "add", full)
    assert rescue(unsaved) is None
