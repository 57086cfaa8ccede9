"""Files are written wholly or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hadamard_toolkit import paths
from hadamard_toolkit.paths import atomic_folder, atomic_write


def test_a_reader_keeps_the_whole_old_file_while_the_new_one_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.link(path, tmp_path / "the same file")
    with path.open() as reader:
        atomic_write(path, "new and longer")
        assert reader.read() == "old"
    assert (tmp_path / "the same file").read_text() == "old"
    assert path.read_text() == "new and longer"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_comes_wholly_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as staging:
        (staging / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as staging:
        (staging / "two").write_text(str(2 / 0))
    assert [path.name for path in target.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with atomic_folder(target) as staging:
        (staging / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]


@pytest.mark.parametrize(
    ("present", "checkout"),
    [
        ((), False),
        (("pyproject.toml",), False),
        (("notebooks",), False),
        (("pyproject.toml", "notebooks"), True),
    ],
)
def test_a_checkout_has_its_project_file_and_its_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], checkout: bool
) -> None:
    for name in present:
        if name == "notebooks":
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("")
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    monkeypatch.delenv("HADAMARD_CACHE", raising=False)
    assert paths.in_checkout() == checkout
    assert (paths.cache_folder() == tmp_path / "data" / "cache") == checkout


def test_a_name_is_a_folder_where_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert paths.folder_of("~/models") == tmp_path / "models"
    assert paths.folder_of("~nobody-of-this-name/models") is None
    assert paths.folder_of("bert-base-uncased") is None


def test_what_killed_processes_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = {1: PermissionError, 2: None, 3: ProcessLookupError}

    def signal(process: int, number: int) -> None:
        assert number == 0, "asked, not killed"
        if error := lives[process]:
            raise error

    monkeypatch.setattr(os, "kill", signal)
    now = 10_000.0
    monkeypatch.setattr(paths.time, "time", lambda: now)
    for process in lives:
        for age in (paths.STALE_SECONDS, paths.STALE_SECONDS + 1):
            folder = tmp_path / f".staging-{process}-{age}"
            folder.mkdir()
            os.utime(folder, (now - age, now - age))
    (tmp_path / ".staging-mine").mkdir()
    os.utime(tmp_path / ".staging-mine", (0, 0))
    (tmp_path / ".staging-3-gone").symlink_to(tmp_path / "nowhere")  # finished while we looked
    before = {path.name for path in tmp_path.iterdir()}
    paths.remove_leftovers(tmp_path)
    gone = before - {path.name for path in tmp_path.iterdir()}
    assert gone == {f".staging-3-{paths.STALE_SECONDS + 1}"}
