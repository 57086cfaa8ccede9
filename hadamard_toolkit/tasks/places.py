"""Where a task's data are looked for, one place after the other, and what its record says of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetDict, load_dataset

from hadamard_toolkit.downloads import file_sha256
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.paths import CHECKOUT
from hadamard_toolkit.tasks.base import check_rows, in_memory

IN_FILES = "local parquet files"  # how the source of a task begins that was read from files of a data root


class Found(NamedTuple):
    """The data of a task: its tables by split, where each split was found, and SHA-256 by file."""

    tables: dict[str, pa.Table]
    where: dict[str, str]
    files: dict[str, str]

    def splits(
        self, text_columns: tuple[str, ...], kind: str, n_labels: int, columns: Iterable[str]
    ) -> DatasetDict:
        """The checked rows of each split, with those of `columns` that are there."""
        splits = DatasetDict()
        for split, table in self.tables.items():
            rows = in_memory(table)
            check_rows(rows, text_columns, kind, n_labels, self.where[split])
            splits[split] = rows.select_columns([name for name in columns if name in rows.column_names])
        return splits


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


def find(
    name: str,
    root: str | Path | None,
    folder: str,
    hub: str,
    local: Callable[[Path], Found],
    remote: Callable[[], Found],
) -> tuple[str, Found]:
    """What was found of task `name`, and its origin in words.

    Asked in order: `root` (alone, if given), `$HADAMARD_DATA` or else `../shared/data` beside the checkout, each by
    `local` where it has `folder`; then `hub` by `remote`. Raises `DataError` that names every place tried.
    """
    tried = []
    for place in local_roots(root):
        if (place / folder).is_dir():
            return f"{IN_FILES}, {folder}", local(place)
        origin = "root" if root is not None else "$HADAMARD_DATA or ../shared/data"
        tried.append(f"{place / folder} ({origin}) does not exist")
    if root is None:
        try:
            return f"hub {hub}", remote()
        except DataError:
            raise
        except Exception as error:  # whatever the hub's client raises: no network, no such repository
            reason = str(error).strip().partition("\n")[0]
            tried.append(f"hub {hub!r} cannot be read ({type(error).__name__}: {reason})")
    raise DataError(
        f"task {name!r} was not found: {'; '.join(tried)}. Set HADAMARD_DATA to a folder with "
        f"{folder}/*.parquet, or allow the hub; the tasks 'embedded/…' need neither"
    )


def read_local(root: Path, folder: str, files: Mapping[str, str]) -> Found:
    """The parquet files `root/folder/<stem>.parquet`; `files` maps split to stem."""
    found = Found({}, {}, {})
    for split, stem in files.items():
        file = f"{folder}/{stem}.parquet"
        found.tables[split], found.files[file] = read_parquet(root, file)
        found.where[split] = str(root / file)
    return found


def read_hub(hub: str, config: str | None, splits: Mapping[str, str], *, label_names: bool = False) -> Found:
    """The splits of a data set on the hub; `splits` maps ours to theirs, and those that the hub lacks are left out.

    The files are those of the hub's local cache, named by the revision. With `label_names`, numbered labels become
    the names that the hub gives them.
    """
    loaded = load_dataset(hub, config) if config else load_dataset(hub)
    splits = {ours: theirs for ours, theirs in splits.items() if theirs in loaded}
    if not splits:
        raise DataError(
            f"hub {hub!r} has the splits {', '.join(map(repr, loaded))}; none of them is known here"
        )
    tables = {}
    for split, theirs in splits.items():
        table, label = loaded[theirs].with_format("arrow")[:], loaded[theirs].features.get("label")
        if label_names and isinstance(label, ClassLabel):
            names = [label.int2str(number) for number in table["label"].to_pylist()]
            table = table.set_column(table.column_names.index("label"), "label", pa.array(names, pa.string()))
        tables[split] = table
    where = f"hub {hub}" + (f", {config}" if config else "")
    places = {split: f"{where}, split {theirs}" for split, theirs in splits.items()}
    cached = [Path(file["filename"]) for theirs in splits.values() for file in loaded[theirs].cache_files]
    prefix = f"/{config}" if config else ""
    digests = {f"{hub}@{file.parent.name}{prefix}/{file.name}": file_sha256(file) for file in cached}
    return Found(tables, places, digests)


def stored(files: Mapping[str, str]) -> dict[str, Path]:
    """Where the `files` of a task's record, named as `read_local` names them, lie now; without those that do not."""
    paths = {file: root / file for root in reversed(local_roots(None)) for file in files}
    return {file: path for file, path in paths.items() if path.is_file()}


def provenance(
    origin: str, official: Mapping[str, int], splits: DatasetDict, files: Mapping[str, str], licence: str
) -> dict[str, Any]:
    """The record of a task's data; `subset` and `note` say which splits have fewer rows than the official ones."""
    rows = {split: data.num_rows for split, data in splits.items()}
    short = [
        f"{split} {rows.get(split, 0):,} of {count:,} rows ({rows.get(split, 0) / count:.1%})"
        for split, count in official.items()
        if rows.get(split, 0) < count
    ]
    return {
        "source": origin,
        "files": dict(files),
        "official_rows": dict(official),
        "rows": rows,
        "subset": bool(short),
        "note": f"subset: {'; '.join(short)}" if short else "",
        "licence": licence,
    }
