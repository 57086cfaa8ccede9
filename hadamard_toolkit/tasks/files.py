"""Where local data lie, and that their bytes are the ones that were listed."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hadamard_toolkit.downloads import file_sha256
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.paths import CHECKOUT


def local_roots(root: str | Path | None) -> list[Path]:
    """Data roots in the order they are asked: only `root` if given, else `$HADAMARD_DATA`, else `../shared/data`."""
    if root is not None:
        return [Path(root).expanduser()]
    chosen = os.environ.get("HADAMARD_DATA")
    return [Path(chosen).expanduser() if chosen else CHECKOUT.parent / "shared" / "data"]


def checked_file(root: Path, file: str) -> tuple[Path, str]:
    """The path of `root/file` and its SHA-256, which must be the one in `root/SHA256SUMS` if that lists it.

    Raises `DataError` that names the file if it is missing or not the listed one.
    """
    path = root / file
    if not path.is_file():
        raise DataError(f"{path} is missing")
    digest = file_sha256(path)
    if (listed := _listed(root).get(file, digest)) != digest:
        raise DataError(f"{path} is not the file that SHA256SUMS lists: expected {listed}, found {digest}")
    return path, digest


def read_parquet(root: Path, file: str) -> tuple[pa.Table, str]:
    """The table in `root/file` and the file's SHA-256; a file that is no parquet is refused like a changed one."""
    path, digest = checked_file(root, file)
    try:
        return pq.read_table(path), digest
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable parquet file: {error}") from error


def _listed(root: Path) -> dict[str, str]:
    sums = root / "SHA256SUMS"
    if not sums.is_file():
        return {}
    rows = (line.split(maxsplit=1) for line in sums.read_text().splitlines() if line.strip())
    return {file.strip().lstrip("*"): digest for digest, file in rows}
