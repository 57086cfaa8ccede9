"""Whether what a run was made from is still what lies here under the same names.

A run's key holds names: of a backbone, of a task. Its record holds their content, and before a stored run counts as
done, or its weights go onto a backbone, the two are compared.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.packed import RECORD

if TYPE_CHECKING:
    from hadamard_toolkit.runs.store import RunStore
    from hadamard_toolkit.tasks.base import Task

ASIDE = "aside"  # of a store: the folder of runs that no longer count


class Here:
    """What lies here now. Each backbone and each task is looked at once, so keep one of these for many runs only while
    nothing is changed."""

    def __init__(self) -> None:
        self._backbones: dict[str, dict[str, Any] | None] = {}
        self._tasks: dict[str, Task | None] = {}

    def changes(self, meta: Mapping[str, Any], backbone: str, task: str | None) -> list[str]:
        """What differs from `meta_info` of a run, in words: the backbone, and the data of `task` unless it is None.

        Facts that the record lacks, and backbones and data that are not here at all, are no difference.
        """
        found = _backbone_changes(backbone, meta.get("backbone", {}), self._backbone(backbone))
        if task is not None:
            found += self._task_changes(task, meta.get("task", {}))
            for step in meta.get("pretraining", []):
                for origin in step.get("origin", []):
                    if origin["task"] != task:
                        found += self._task_changes(origin["task"], origin)
        return list(dict.fromkeys(found))

    def changes_of(self, record: Mapping[str, Any]) -> list[str]:
        """The same for a whole run.json."""
        spec = record["spec"]
        return self.changes(record.get("meta_info", {}), spec["backbone"], spec["task"])

    def _backbone(self, name: str) -> dict[str, Any] | None:
        from hadamard_toolkit.backbones import backbone_provenance

        if name not in self._backbones:
            try:
                self._backbones[name] = backbone_provenance(name)
            except Exception:  # whatever a folder or the hub's cache has to say: there is nothing to compare
                self._backbones[name] = None
        return self._backbones[name]

    def _task(self, name: str) -> Task | None:
        from hadamard_toolkit.tasks.registry import load_task

        if name not in self._tasks:
            try:
                self._tasks[name] = load_task(name)
            except Exception:  # of a loader of your own it may be anything
                self._tasks[name] = None
        return self._tasks[name]

    def _task_changes(self, name: str, recorded: Mapping[str, Any]) -> list[str]:
        from hadamard_toolkit.downloads import checked_sha256
        from hadamard_toolkit.tasks.places import IN_FILES, stored

        files = recorded.get("files") or {}
        wrong: list[str] = []
        if str(recorded.get("source") or "").startswith(IN_FILES):
            now = {file: checked_sha256(path) for file, path in stored(files).items()}
            wrong = _unlike(f"task {name!r}", files, now)
            if not wrong:  # all of it is here unchanged, or nothing is here; either way no row need be read
                return []
        task = self._task(name)
        if task is None:
            return wrong
        if content := recorded.get("content"):  # other bytes may hold the same rows
            return _unlike(f"task {name!r}, split", content, task.content())
        now = task.provenance.get("files") or {}
        rows = {split: f"{count:,} rows" for split, count in (recorded.get("rows") or {}).items()}
        return (
            wrong
            or _unlike(f"task {name!r}", files, {file: now[file] for file in files if file in now})
            or _unlike(f"task {name!r}, split", rows, {s: f"{len(r):,} rows" for s, r in task.splits.items()})
        )


def require_unchanged(store: RunStore, key: str, here: Here | None = None) -> None:
    """Raise `DataError` if what a run of `store` was made from is not what is here."""
    here, record = here or Here(), store.record(key)
    if found := here.changes_of(record):
        raise DataError(_refusal(key, found))
    for source in _sources(record):
        if source in store:
            require_unchanged(store, source, here)


def require_same(key: str, meta: Mapping[str, Any], backbone: str, task: str | None) -> None:
    """Raise `DataError` if the backbone, or the data of `task`, are not those of a run with this `meta_info`."""
    if found := Here().changes(meta, backbone, task):
        raise DataError(_refusal(key, found))


def outdated(store: RunStore) -> pd.DataFrame:
    """`RunStore.outdated`."""
    here, records, reasons, keys = Here(), {}, {}, store.keys()
    for key in keys:
        try:
            records[key] = store.record(key)
        except DataError as error:
            warnings.warn(f"skipped {store.folder / key}: {error}", stacklevel=3)
    for key, record in records.items():
        if found := here.changes_of(record):
            reasons[key] = "; ".join(found)
    for key, record in records.items():
        if stale := [source for source in _sources(record) if source in reasons]:
            reasons.setdefault(key, f"it builds on run {stale[0]}: {reasons[stale[0]]}")
    columns = ["key", "backbone", "task", "label", "seed", "reason"]
    rows = [{**records[key]["spec"], **records[key], "reason": reasons[key]} for key in sorted(reasons)]
    return pd.DataFrame(rows, columns=columns)


def set_aside(store: RunStore, keys: Sequence[str]) -> Path:
    """`RunStore.set_aside`. Weights that the store kept for fusions over these runs go with them."""
    from hadamard_toolkit.runs.fusion_sources import KEPT

    if packed := [key for key in keys if not (store.folder / key / RECORD).is_file()]:
        raise ArgumentError(
            f"key={packed[0]!r} is a packed run; put its plan back into folders first (hadamard pack --undo PLAN.toml)"
        )
    place = store.folder / ASIDE
    place.mkdir(exist_ok=True)
    for key in keys:
        numbered = (place / f"{key}.{number}" for number in itertools.count(1))
        target = next(path for path in numbered if not path.exists())
        (store.folder / key).rename(target)
        if (store.folder / KEPT / key).is_dir():
            (store.folder / KEPT / key).rename(target / KEPT)
    return place


def _sources(record: Mapping[str, Any]) -> list[str]:
    """The runs whose adapters a run fuses."""
    return [source["key"] for source in record.get("train_info", {}).get("sources", {}).values()]


def _refusal(key: str, found: Sequence[str]) -> str:
    return (
        f"run {key} was made from other content than is here now under the same names: {'; '.join(found)}. Put the old "
        "content back, or use another store, or set such runs aside: store.set_aside(store.outdated()['key'])"
    )


def _backbone_changes(name: str, recorded: Mapping[str, Any], now: Mapping[str, Any] | None) -> list[str]:
    if now is None:
        return []
    found = []
    if recorded.get("sha256"):
        found = _unlike(f"backbone {name!r}", recorded["sha256"], now["sha256"], every=True)
    return found + _unlike(f"backbone {name!r}", recorded.get("files") or {}, now.get("files") or {})


def _unlike(what: str, then: Mapping[str, str], now: Mapping[str, str], *, every: bool = False) -> list[str]:
    """The names under which the two differ; those that only one of them has count where `every` one must be there."""
    names = [name for name in then if name in now or every] + [
        name for name in now if every and name not in then
    ]
    return [
        f"{what} {name!r} was {_short(then.get(name, 'not there'))} and is {_short(now.get(name, 'not there'))}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _short(content: str) -> str:
    return f"SHA-256 {content[:12]}…" if len(content) == 64 else content
