"""A finished plan in one file: the folders of its runs, byte for byte, in one parquet file of the store.

The file has a row per file of a run: `key`, `name` (its path inside the run's folder), `sha256` and `content`. All rows
of one name form a row group, ordered by backbone, task and seed. What runs share (labels, row numbers, versions) lies
side by side that way, so that compression stores it once, and the records are read without the tensors.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.paths import atomic_folder, atomic_write, cache_folder

ENDING = ".runs.parquet"
RECORD = "run.json"
FORMAT = b"1"
SCHEMA = pa.schema(
    [("key", pa.string()), ("name", pa.string()), ("sha256", pa.string()), ("content", pa.binary())]
)
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # a file of a run's folder, or of one folder in it
Files = dict[tuple[str, str], bytes]  # (key, name) -> content


class Pack:
    """The runs in one packed file; `packs_in` opens those of a store. `names`: key -> names of the files it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = pq.ParquetFile(path)
            facts = file.schema_arrow.metadata or {}
            if facts.get(b"format") != FORMAT or not file.schema_arrow.equals(SCHEMA):
                raise DataError(f"{path} is no packed plan that this version reads")
            columns = file.read(["key", "name"]).to_pydict()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is no packed plan, or is damaged: {error}") from None
        self.names: dict[str, set[str]] = {}
        for key, name in zip(columns["key"], columns["name"], strict=True):
            self.names.setdefault(key, set()).add(name)

    def record(self, key: str) -> Any:
        """What run.json of a run says; its checksum was compared."""
        return json.loads(self._content(self._records[key]))

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self._rows([("name", "=", RECORD)])}

    def files(self) -> Files:
        """Content by key and name; all checksums must hold."""
        return {(row["key"], row["name"]): self._content(row) for row in self._rows()}

    def _rows(self, filters: list[tuple[str, str, str]] | None = None) -> list[dict[str, Any]]:
        try:
            return list(pq.read_table(self.path, filters=filters).to_pylist())
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def _content(self, row: Mapping[str, Any]) -> bytes:
        if not re.fullmatch(r"[0-9a-f]{16}", row["key"]) or not NAME.fullmatch(row["name"]):
            raise DataError(f"{self.path} is damaged: {row['key']}/{row['name']} is no file of a run")
        if _digest(row["content"]) != row["sha256"]:
            raise DataError(f"{self.path} is damaged: the checksum of {row['key']}/{row['name']} is wrong")
        return bytes(row["content"])

    def folder(self, key: str) -> Path:
        """A folder with the files of run `key`; all of the pack go into the cache when one is first asked for.

        Where the cache cannot be written, they go into a temporary folder that this process removes at its end.
        """
        return self._unpacked / key

    @cached_property
    def _unpacked(self) -> Path:
        stem = self.path.name.removesuffix(ENDING)
        target = cache_folder() / "packs" / f"{stem}-{_digest(self.path.read_bytes())[:16]}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.lock")):
                if not target.is_dir():
                    with atomic_folder(target) as staging:
                        write_files(self.files(), staging)
        except OSError:
            target = Path(tempfile.mkdtemp(prefix="hadamard-pack-"))
            atexit.register(shutil.rmtree, target, ignore_errors=True)
            write_files(self.files(), target)
        return target


def packs_in(folder: Path) -> list[Pack]:
    """The packed plans of a store, by name; each file is opened once while it stays the same.

    A file that cannot be opened is left out with a warning that names it.
    """
    packs = []
    for path in sorted(folder.glob(f"*{ENDING}")):
        state = path.stat()
        try:
            packs.append(_opened(path, state.st_mtime_ns, state.st_size))
        except DataError as error:
            warnings.warn(
                f"skipped a packed file: {error}; restore it (git restore, or a copy of yours)", stacklevel=2
            )
    return packs


@lru_cache(maxsize=64)
def _opened(path: Path, modified: int, size: int) -> Pack:
    return Pack(path)


def write_pack(path: Path, files: Files, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `files` to `path`, wholly or not at all, and check what was written. Equal files give equal bytes."""

    def order(entry: tuple[str, str]) -> tuple[Any, ...]:
        spec = records[entry[0]]["spec"]
        return spec["backbone"], spec["task"], spec["seed"], entry[0]

    by_name: dict[str, list[tuple[str, str]]] = {}
    for entry in sorted(files):
        by_name.setdefault(entry[1], []).append(entry)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        SCHEMA.with_metadata({b"format": FORMAT}),
        compression="zstd",
        compression_level=19,
        use_dictionary=["name"],
        write_statistics=["name"],  # by which a reader leaves out the other files
        data_page_size=1 << 28,  # one page per row group: compression sees all files of a name at once
    ) as writer:
        for entries in by_name.values():
            rows = [
                {"key": key, "name": name, "sha256": _digest(files[key, name]), "content": files[key, name]}
                for key, name in sorted(entries, key=order)
            ]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=len(rows))
    staging = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        atomic_write(staging, sink.getvalue().to_pybytes())
        if Pack(staging).files() != files:
            raise DataError(f"{path} was not written as it should be; the runs stay in their folders")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files in a run's folder and in the folders in it."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: (folder / name).read_bytes() for name in names if NAME.fullmatch(name)}


def write_files(files: Files, folder: Path) -> None:
    """Every file under `folder/<key>/<name>`."""
    for (key, name), content in files.items():
        path = folder / key / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def remove_packed(folder: Path, packed: Mapping[str, bytes]) -> None:
    """Remove from a run's folder what is packed with the same content, the record first.

    Whatever is killed when, the run is whole in the folder or in the pack; a table that was measured meanwhile stays.
    """
    for name in sorted(packed, key=lambda name: name != RECORD):
        path = folder / name
        if path.is_file() and path.read_bytes() == packed[name]:
            path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        _remove_if_empty(path)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
