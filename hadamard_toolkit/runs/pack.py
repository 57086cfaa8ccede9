"""`pack` and `unpack`: the finished runs of a plan from their folders into one file of the store, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.paths import atomic_folder, atomic_write
from hadamard_toolkit.runs.fusion_sources import source_specs
from hadamard_toolkit.runs.packed import (
    ENDING,
    RECORD,
    Files,
    Pack,
    packs_in,
    read_folder,
    remove_packed,
    write_files,
    write_pack,
)
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.store import RunStore, as_store

LEFT_OUT = ("adapter", "protocol", "sparsity")  # JSON texts, as long as all other columns together
DIGITS = "%.6g"


def pack(plan: str | Path, store: RunStore | str | Path) -> Path:
    """Put the finished runs of a plan file into one file of the store and remove their folders.

    `<plan>.runs.parquet` holds every file of every run byte for byte, in about two fifths of the size; `<plan>.csv`
    beside it is `RunStore.wide` of the same runs, for people and for diffs. `RunStore` reads folders and packed runs
    alike, so nothing else changes. Runs that another plan has packed already stay there.

    Packing again adds what has come since (runs, and tables measured on packed ones). The file is written under
    another name, read back and compared before any folder goes, so it can be interrupted at any moment and repeated.
    Equal runs give equal bytes.

    Returns the path of the packed file. `ArgumentError` if no run of the plan is there.
    """
    store, plan = as_store(store), Path(plan)
    path = store.folder / f"{plan.stem}{ENDING}"
    files: Files = Pack(path).files() if path.is_file() else {}
    before = dict(files)
    elsewhere = {key for other in packs_in(store.folder) if other.path != path for key in other.names}
    specs = [store.known(spec) for spec in load_plan(plan)]
    under = [source for spec in specs for source in source_specs(spec).values()]
    keys = [spec.key for spec in (*specs, *under) if spec in store and spec.key not in elsewhere]
    if not keys:
        raise ArgumentError(f"plan={str(plan)!r} has no run in {store.folder} that is not packed elsewhere")
    loose: dict[str, dict[str, bytes]] = {}
    for key in dict.fromkeys(keys):
        if (store.folder / key).is_dir():
            loose[key] = read_folder(store.folder / key)
            if RECORD in loose[key]:  # a run that was done again replaces the packed one
                files = {entry: content for entry, content in files.items() if entry[0] != key}
            files |= {(key, name): content for name, content in loose[key].items()}
    records = {key: store.record(key) for key in {key for key, _ in files}}
    if files != before:
        write_pack(path, files, records)
    for key, packed in loose.items():
        remove_packed(store.folder / key, packed)
    atomic_write(path.with_name(f"{plan.stem}.csv"), _table(store.only(records)))
    return path


def unpack(plan: str | Path, store: RunStore | str | Path) -> list[str]:
    """Put the packed runs of a plan file back into folders, with the same bytes, and remove the packed file.

    Returns their keys. Folders that are there already are left as they are.
    """
    store, plan = as_store(store), Path(plan)
    path = store.folder / f"{plan.stem}{ENDING}"
    if not path.is_file():
        raise ArgumentError(f"plan={str(plan)!r} was not packed: {path} is not there")
    by_key: dict[str, Files] = {}
    for (key, name), content in Pack(path).files().items():
        by_key.setdefault(key, {})[key, name] = content
    for key, files in by_key.items():
        target = store.folder / key
        if (target / RECORD).is_file():
            continue
        kept = read_folder(target) if target.is_dir() else {}  # measured since the run was packed
        files |= {(key, name): content for name, content in kept.items()}
        with atomic_folder(target) as staging:
            write_files({("", name): content for (_, name), content in files.items()}, staging)
    path.unlink()
    path.with_name(f"{plan.stem}.csv").unlink(missing_ok=True)
    return sorted(by_key)


def _table(part: RunStore) -> str:
    wide: pd.DataFrame = part.wide().drop(columns=list(LEFT_OUT)).sort_index()
    changing = [name for name in wide.columns if name in ("backbone", "task", "label") or _varies(wide[name])]
    return str(wide[changing].to_csv(float_format=DIGITS, lineterminator="\n"))


def _varies(column: pd.Series[Any]) -> bool:
    return bool(column.nunique(dropna=False) > 1)
