"""Where files go, and how they are written: wholly or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from platformdirs import user_cache_dir

CHECKOUT = Path(__file__).resolve().parent.parent


def in_checkout() -> bool:
    """Whether the package runs from a checkout of the repository (not from an installed wheel)."""
    return (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "notebooks").is_dir()


def cache_folder() -> Path:
    """`$HADAMARD_CACHE`, else `data/cache` of the checkout, else the user's cache folder."""
    if chosen := os.environ.get("HADAMARD_CACHE"):
        return Path(chosen).expanduser()
    return CHECKOUT / "data" / "cache" if in_checkout() else Path(user_cache_dir("hadamard_toolkit"))


PREPARED = "HADAMARD_PREPARED"


def place_in(prepared: Path, kind: str, name: str) -> Path:
    """Where a prepared folder (see `runs.prepared`) holds one of its `backbones`, `tasks` or `bases`."""
    return prepared / kind / quote(name, safe="")


def prepared_place(kind: str, name: str) -> Path | None:
    """The same in the folder that `$HADAMARD_PREPARED` names, if it holds that; else None."""
    chosen = os.environ.get(PREPARED)
    place = place_in(Path(chosen), kind, name) if chosen else None
    return place if place is not None and place.is_dir() else None


def folder_of(name: str) -> Path | None:
    """The folder that `name` is the path of; None where it is something else, such as a hub id."""
    try:
        folder = Path(name).expanduser()
    except RuntimeError:  # "~somebody" who is not here
        return None
    return folder if os.path.isdir(folder) else None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` when the block ends well and vanishes when it does not.

    A folder that is already at `target` is replaced; a killed process leaves only a `.staging-*` sibling.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{os.getpid()}-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


STALE_SECONDS = (
    600  # writing takes seconds; whether a process of another machine lives cannot be known sooner
)


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` what `atomic_folder` of a killed process left half-written there."""
    for path in folder.glob(".staging-*"):
        owner = re.match(r"\.staging-(\d+)-", path.name)
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # its writer has just finished
            continue
        if owner and age > STALE_SECONDS and not _lives(int(owner[1])):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it lives and belongs to somebody else
        return True
    return True


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_files(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Write `files` (name -> content) into `folder`, all or none: every byte is on the disk before a name is given.

    What else is in `folder` stays; where there is none, it is made. A full disk leaves everything as it was.
    """
    if not folder.exists():
        with atomic_folder(folder) as staging:
            for name, data in files.items():
                atomic_write(staging / name, data)
        return
    beside = Path(tempfile.mkdtemp(prefix=f".staging-{os.getpid()}-", dir=folder))
    try:
        for name, data in files.items():
            atomic_write(beside / name, data)
        for name in files:
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
