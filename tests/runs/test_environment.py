"""What a record says of the machine, also where the machine tells little."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch

from hadamard_toolkit.runs import environment


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_the_version_is_that_of_the_checkout_where_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    assert environment.toolkit_version() == "unknown"
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    assert environment.toolkit_version() == "1.2.3"
    versions = environment.versions()
    assert versions.pop("python") == platform.python_version()
    assert versions.pop("hadamard_toolkit") == "1.2.3"
    assert versions == dict.fromkeys(environment.PACKAGES, "missing")


def test_the_commit_is_known_in_a_checkout_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    look = environment.git_state.__wrapped__
    if (repository / ".git").exists():
        state = look()
        assert len(state["commit"]) == 40
        assert isinstance(state["dirty"], bool)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)  # no repository
    assert look() is None
    monkeypatch.setattr(environment, "in_checkout", lambda: False)
    assert look() is None


def test_the_system_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert environment.usable_cores() == 3
    assert environment.system() == {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": 3,
    }
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert environment.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert environment.usable_cores() == 1


def test_a_processor_without_a_name_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    look = environment.cpu_name.__wrapped__
    text = "processor : 0\nmodel name\t: Fast 9000\nprocessor : 1\nmodel name\t: Fast 9000\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert look() == "Fast 9000"

    def fail(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert look() == "arm"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert look() == "arm64"


def test_the_device_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment.reset_peak_memory()
    assert set(environment.peak_memory()) == {"process_bytes"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    environment.reset_peak_memory()
    assert reset == [True]
    peak = environment.peak_memory()
    assert peak["accelerator_bytes"] == 2**31
    assert 2**24 < peak["process_bytes"] < 2**40, "bytes, of a process that has loaded torch"
    assert environment.describe_device(torch.device("cuda", 1)) == {
        "device": "cuda",
        "device_name": "card 1",
        "threads": torch.get_num_threads(),
    }
    cpu = environment.describe_device(torch.device("cpu"))
    assert (cpu["device"], cpu["device_name"]) == ("cpu", environment.cpu_name())


def test_an_error_is_told_without_the_folders_of_this_machine() -> None:
    path = Path.home() / "models" / "weights"
    try:
        raise ValueError(f"{path} is no model")
    except ValueError as error:
        told = environment.describe_error(error)
    assert (told["error"], told["message"]) == ("ValueError", f"~{os.sep}models{os.sep}weights is no model")
    assert told["traceback"].startswith(str(Path("tests", "runs", "test_environment.py")) + ":")
    assert told["traceback"].endswith("in test_an_error_is_told_without_the_folders_of_this_machine")
