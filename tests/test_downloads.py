"""Pinned downloads, through the real pip and a registry that is a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hadamard_toolkit import downloads
from hadamard_toolkit.downloads import Distribution, checked_sha256, downloads_folder, fetch
from hadamard_toolkit.errors import DownloadError
from tests.permissions import read_only

NAME = "tiny_thing-1.0-py3-none-any.whl"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry, an empty cache, no network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    return folder


def _wheel(folder: Path, name: str = NAME) -> Distribution:
    info = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return _pinned(folder / name)


def _pinned(path: Path, sha256: str = "") -> Distribution:
    digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return Distribution("tiny-thing", "1.0", path.name, path.stat().st_size, digest)


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_fetch_gets_the_file_once_and_says_so_in_one_line(
    registry: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distribution = _wheel(registry)
    path = fetch(distribution)
    assert path == downloads_folder() / NAME
    assert path.read_bytes() == (registry / NAME).read_bytes()
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"downloading {re.escape(NAME)} \(0\.0 MB\) \d+\.\d s", line)

    before = path.stat()
    (registry / NAME).unlink()  # a second call must not need the registry
    assert fetch(distribution) == path
    assert path.stat() == before
    assert capfd.readouterr().err == ""
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".staging")]


def test_callers_at_the_same_time_share_one_download(
    registry: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distribution = _wheel(registry)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, [distribution] * 4))
    assert paths == {downloads_folder() / NAME}
    assert capfd.readouterr().err.count("downloading") == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_deleted_and_both_hashes_named(registry: Path, damage: str) -> None:
    distribution = _wheel(registry)
    path = fetch(distribution)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        DownloadError, match=f"{NAME} is damaged: expected SHA-256 {distribution.sha256}, found {found}"
    ):
        fetch(distribution)
    assert not path.exists()
    assert fetch(distribution).read_bytes() == whole


def test_another_file_in_the_registry_is_refused_and_not_kept(registry: Path) -> None:
    real = _wheel(registry).sha256
    expected = "0" * 64
    with pytest.raises(DownloadError, match=f"{NAME}.*expected {expected}, found {real}"):
        fetch(_pinned(registry / NAME, expected))
    assert _visible(downloads_folder()) == []


def test_a_source_distribution_that_is_not_the_pinned_one_never_runs(registry: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    source = f"open({str(witness)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='tiny-thing')\n"
    path = registry / "tiny-thing-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (
            ("setup.py", source),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"tiny-thing-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    distribution = _pinned(path, "0" * 64)
    assert distribution.is_source
    with pytest.raises(DownloadError, match="another SHA-256"):
        fetch(distribution)
    assert not witness.exists()


def test_no_network_and_an_empty_cache_tell_how_to_help_oneself(registry: Path) -> None:
    distribution = _wheel(registry)
    offered = (registry / NAME).read_bytes()
    (registry / NAME).unlink()
    with pytest.raises(DownloadError) as refused:
        fetch(distribution)
    for part in (NAME, str(downloads_folder()), distribution.sha256, "by hand"):
        assert part in str(refused.value)
    (downloads_folder() / NAME).write_bytes(offered)
    assert fetch(distribution).read_bytes() == offered


def test_an_environment_without_pip_is_named(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=f"{NAME}.*pip is missing"):
        fetch(_wheel(registry))


def test_remembered_hash_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    stat = path.stat()
    assert checked_sha256(path) == checked_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")  # of the same size, and its date is put back, as `cp -p` would
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert checked_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_hashes_are_remembered_between_processes_in_the_own_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "theirs" / "file"
    path.write_bytes(b"one")
    read: list[Path] = []
    real = downloads.file_sha256
    monkeypatch.setattr(downloads, "file_sha256", lambda path: read.append(path) or real(path))
    for _ in range(2):
        downloads._remembered_sha256.cache_clear()  # another process
        assert checked_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert [file.parent for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [
        tmp_path / "cache" / "hashes"
    ]


def test_hashes_need_no_place_to_be_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_bytes(b"")
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "a file" / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert checked_sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written_to_serves_what_it_has(registry: Path) -> None:
    distribution = _wheel(registry)
    path = fetch(distribution)
    with read_only(path.parent.parent):
        assert fetch(distribution) == path
    path.unlink()
    with read_only(path.parent.parent), pytest.raises(DownloadError) as refused:
        fetch(distribution)
    assert str(refused.value) == (
        f"{NAME} has no place: {downloads_folder()} cannot be written to (Permission denied); "
        "set HADAMARD_CACHE to a folder that can"
    )


def test_a_damaged_file_that_cannot_be_deleted_is_named(registry: Path) -> None:
    distribution = _wheel(registry)
    path = fetch(distribution)
    path.write_bytes(b"damaged")
    with (
        read_only(path.parent),
        pytest.raises(DownloadError, match=f"{NAME} is damaged.*cannot be deleted.*replace it there"),
    ):
        fetch(distribution)
    assert path.read_bytes() == b"damaged"
