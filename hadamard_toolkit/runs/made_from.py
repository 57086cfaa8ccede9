"""Whether what a run was made from is still what is here under the same names.

A run's key holds the names of its backbone and its task. Its record holds their content. Before a stored run counts as
done, or its weights are put onto a backbone, the record is compared with what is here now.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import DataError

if TYPE_CHECKING:
    from hadamard_toolkit.tasks.base import Task


class Here:
    """What is here now. Each backbone and each task is looked at once, so share one of these between many runs, and
    make a new one after a change."""

    def __init__(self) -> None:
        self._backbones: dict[str, dict[str, Any] | None] = {}
        self._tasks: dict[str, Task | None] = {}

    def changes(self, meta: Mapping[str, Any], backbone: str, task: str | None) -> list[str]:
        """What differs from `meta_info` of a run, in words: the backbone, and the data of `task` unless it is None.

        Facts that the record lacks, and backbones and data that are not here at all, are no difference.
        """
        changes = _backbone_changes(backbone, meta.get("backbone", {}), self._backbone(backbone))
        if task is not None:
            changes += self._task_changes(task, meta.get("task", {}))
            for step in meta.get("pretraining", []):
                for origin in step.get("origin", []):
                    if origin["task"] != task:
                        changes += self._task_changes(origin["task"], origin)
        return list(dict.fromkeys(changes))

    def changes_of(self, record: Mapping[str, Any]) -> list[str]:
        """The same for a whole run.json."""
        spec = record["spec"]
        return self.changes(record.get("meta_info", {}), spec["backbone"], spec["task"])

    def require_same(self, key: str, meta: Mapping[str, Any], backbone: str, task: str | None) -> None:
        """Raise `DataError` if the backbone, or the data of `task`, are not those of a run with this `meta_info`."""
        if changes := self.changes(meta, backbone, task):
            raise DataError(
                f"run {key} was made from other content than is here now under the same names: {'; '.join(changes)}. "
                "Put the old content back, or use another store, or set such runs aside: "
                "store.set_aside(store.outdated()['key'])"
            )

    def _backbone(self, name: str) -> dict[str, Any] | None:
        from hadamard_toolkit.backbones import backbone_provenance

        if name not in self._backbones:
            try:
                self._backbones[name] = backbone_provenance(name)
            except Exception:  # of a folder or the hub's cache: there is nothing to compare
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
        from hadamard_toolkit.tasks.registry import is_built_in

        files = recorded.get("files") or {}
        changes: list[str] = []
        if str(recorded.get("source") or "").startswith(IN_FILES):
            now = {file: checked_sha256(path) for file, path in stored(files).items()}
            changes = _differences(f"task {name!r}", files, now)
            # The files are unchanged, or not here. No row need be read: the library's own loader fixes all else.
            if not changes and is_built_in(name):
                return []
        task = self._task(name)
        if task is None:
            return changes
        meaning = {"label_names": repr(list(task.labels)), "metric": task.metric}
        recorded_meaning = {fact: str(recorded[fact]) for fact in meaning if fact in recorded}
        others = _differences(f"task {name!r}", recorded_meaning, meaning)
        if content := recorded.get("content"):  # other bytes may hold the same rows
            return _differences(f"task {name!r}, split", content, task.content(), same_names=True) + others
        now = task.provenance.get("files") or {}
        rows = {split: f"{count:,} rows" for split, count in (recorded.get("rows") or {}).items()}
        return others + (
            changes
            or _differences(f"task {name!r}", files, {file: now[file] for file in files if file in now})
            or _differences(
                f"task {name!r}, split", rows, {s: f"{len(r):,} rows" for s, r in task.splits.items()}
            )
        )


def sources_of(record: Mapping[str, Any]) -> list[str]:
    """Keys of the runs whose adapters a run fuses."""
    return [source["key"] for source in record.get("train_info", {}).get("sources", {}).values()]


def _backbone_changes(name: str, recorded: Mapping[str, Any], now: Mapping[str, Any] | None) -> list[str]:
    if now is None:
        return []
    what, changes = f"backbone {name!r}", []
    if recorded.get("sha256"):
        changes = _differences(what, recorded["sha256"], now["sha256"], same_names=True)
    return changes + _differences(what, recorded.get("files") or {}, now.get("files") or {})


def _differences(
    what: str, then: Mapping[str, str], now: Mapping[str, str], *, same_names: bool = False
) -> list[str]:
    """In words, where the two differ under one name; with `same_names`, a name that only one of them has counts too."""
    names = (
        [*then, *(name for name in now if name not in then)] if same_names else [n for n in then if n in now]
    )
    return [
        f"{what} {name!r} was {_short(then.get(name, 'not there'))} and is {_short(now.get(name, 'not there'))}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _short(content: str) -> str:
    return f"SHA-256 {content[:12]}…" if re.fullmatch("[0-9a-f]{64}", content) else content
