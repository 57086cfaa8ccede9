"""`hadamard fetch` and `hadamard doctor`, with a pinned backbone of our own, so that nothing is downloaded."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hadamard_toolkit import cli, doctor, pinned
from hadamard_toolkit.downloads import file_sha256
from hadamard_toolkit.errors import DownloadError
from hadamard_toolkit.runs import environment
from tests.runs.conftest import backbone_folder, data_root, make_spec

__all__ = ["backbone_folder", "data_root", "make_spec"]  # fixtures of the runs serve here too


@pytest.fixture
def tiny_pin(tmp_path: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only pinned backbone is `tiny`; "downloading" it copies a folder. Returns where it will lie."""
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    digests = {path.name: file_sha256(path) for path in backbone_folder.iterdir()}
    real = pinned.PINNED["minilm-l6"]
    monkeypatch.setattr(pinned, "PINNED", {"tiny": replace(real, files=digests)})
    monkeypatch.setattr(doctor, "PINNED", pinned.PINNED)
    monkeypatch.setattr(
        pinned, "_unpack", lambda pin, folder: shutil.copytree(backbone_folder, folder, dirs_exist_ok=True)
    )
    return tmp_path / "cache" / "backbones" / "tiny"


def test_fetch_brings_checks_and_mends(
    tiny_pin: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fetch", "tiny"]) == 0
    weights = tiny_pin / "model.safetensors"
    good = weights.read_bytes()
    assert "SHA-256 checked" in capsys.readouterr().out
    weights.write_bytes(good[:-1] + b"?")
    assert cli.main(["fetch", "tiny"]) == 0
    assert weights.read_bytes() == good
    assert cli.main(["fetch", "bert-huge"]) == 2
    assert "NAME='bert-huge' is not allowed; choose one of 'tiny', 'embedded'" in capsys.readouterr().err


def test_fetch_out_of_reach_is_one_error(
    tiny_pin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*arguments: object) -> None:
        raise DownloadError("tiny is out of reach")

    monkeypatch.setattr(pinned, "_unpack", unreachable)
    assert cli.main(["fetch", "tiny"]) == 2
    assert capsys.readouterr().err == "hadamard: tiny is out of reach\n"


def test_doctor_tells_present_from_missing_from_broken(
    tiny_pin: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(data_root))

    def report() -> tuple[int, dict[str, str], str]:
        status = cli.main(["doctor"])
        *lines, last = capsys.readouterr().out.splitlines()
        return status, {line.split()[1]: line for line in lines}, last

    status, found, last = report()
    assert (status, last) == (0, "nothing is broken")
    assert found["tiny"].startswith("--")
    assert "hadamard fetch tiny" in found["tiny"]
    assert found["embedded"].startswith("--")
    assert found["glue"].endswith(f"sst2 in {data_root}")
    assert "offline (HF_HUB_OFFLINE" in found["hub"]
    assert {"python", "torch", "device", "threads", "cache"} <= set(found)

    cli.main(["fetch", "tiny"])
    assert report()[1]["tiny"].startswith("ok")
    (tiny_pin / "config.json").rename(tiny_pin / "elsewhere")
    assert report()[1]["tiny"].startswith("--"), "a part of it is not all of it"
    (tiny_pin / "config.json").write_text("{}")
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "missing"})
    status, found, last = report()
    assert (status, last) == (1, "broken: torch, tiny")
    assert "config.json" in found["tiny"]
    assert "is damaged" in found["tiny"]


def test_doctor_names_a_cache_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "file" / "cache"))
    assert cli.main(["doctor"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (found,) = [line for line in lines if line.split()[1] == "cache"]
    assert "cache" in last
    assert found.startswith("!!")
    assert "cannot be written to (Not a directory); set HADAMARD_CACHE" in found


def test_doctor_compares_versions_with_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n{}"
    for name, needs in (("hadamard_toolkit", "torch<1"), ("another", "numpy<1")):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        text = metadata.format(name, f"Requires-Dist: {needs}\n")
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("!!")]
    assert re.search(
        r"requirements +hadamard.toolkit 1\.0 has requirement torch<1, but you have torch 2", line
    )
    assert last == "broken: requirements"


def test_doctor_says_where_data_would_be_and_that_the_hub_may_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path))
    for flag in doctor.HUB_FLAGS:
        monkeypatch.setenv(flag, "0")
    [glue] = [finding for finding in doctor._data() if finding.topic == "glue"]
    assert glue.ok is None
    assert f"no local files in {tmp_path}; set HADAMARD_DATA" in glue.text
    [hub] = doctor._hub()
    assert hub.ok
    assert hub.text.startswith("allowed")
    monkeypatch.setenv(doctor.HUB_FLAGS[-1], "yes")
    [hub] = doctor._hub()
    assert hub.text.startswith(f"offline ({doctor.HUB_FLAGS[-1]})")
