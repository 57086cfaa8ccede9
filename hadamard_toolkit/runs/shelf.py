"""Where the files of runs lie: in a folder per run, or packed in one file per plan."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.packed import ENDING, Pack, packs_in
from hadamard_toolkit.runs.record import RECORD, check_record, read_record
from hadamard_toolkit.runs.spec import RunSpec

# Folders of a store that are no runs: notes of failed runs, claims, runs that no longer count, and weights that the
# store does not keep itself but that fusions need (nothing breaks without these).
FAILED, CLAIMS, ASIDE, SOURCES = "failed", ".claims", "aside", ".sources"
KEY = re.compile(r"[0-9a-f]{16}")


class Shelf:
    """The records and files of the runs in `folder`, in folders and packed; `RunStore` adds tables and writing.

    A packed file that is damaged is left out with a warning that names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._only: frozenset[str] | None = None  # all runs

    def keys(self) -> list[str]:
        """Keys of the runs that are done, sorted."""
        loose = {name for name in self._folders() if KEY.fullmatch(name) and self._is_loose(name)}
        return sorted(loose.union(self._packs()))

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, run: object) -> bool:
        key = run.key if isinstance(run, RunSpec) else run
        if not isinstance(key, str) or not KEY.fullmatch(key) or not self._shown(key):
            return False
        return self._is_loose(key) or self._pack_of(key) is not None

    def known(self, spec: RunSpec) -> RunSpec:
        """`spec` as this store has it: a run on a folder may be recorded under the spelling that the caller gave."""
        earlier = spec.as_given()
        return earlier if spec not in self and earlier in self else spec

    def record(self, key: str) -> dict[str, Any]:
        """The checked run.json of the run with this very key, loose or packed; `DataError` says what is wrong."""
        return self._record(key, self._pack_of(key))

    def _record(self, key: str, pack: Pack | None) -> dict[str, Any]:
        folder = self.folder / key
        if pack is None or self._is_loose(key):
            return read_record(folder)
        return check_record(pack.record(key), folder)

    def folder_of(self, key: str) -> Path:
        """The folder that holds the files of a run; those of a packed run are unpacked into the cache for it."""
        key = self.resolve(key)
        pack = None if self._is_loose(key) else self._pack_of(key)
        return self.folder / key if pack is None else pack.folder(key)

    def has(self, key: str, name: str) -> bool:
        """Whether the run has a file of this name, such as `"masks.safetensors"` or `"measured/removal.json"`."""
        pack = self._pack_of(key)
        return (self.folder / key / name).is_file() or (pack is not None and name in pack.names[key])

    def resolve(self, key: str) -> str:
        """The key of the only run whose key begins so; `ArgumentError` for none or several."""
        if key in self:
            return key
        candidates = [known for known in self.keys() if key and known.startswith(key)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise ArgumentError(f"key={key!r} begins the keys {', '.join(candidates)}; give more of it")
        raise ArgumentError(f"key={key!r} is no run of {self.folder}")

    def way_out(self, key: str) -> str:
        """What to do about a run whose record is damaged."""
        folder = self.folder / key
        pack = None if self._is_loose(key) else self._pack_of(key)
        if pack is None:
            return f"remove the folder {folder} to do the run again"
        plan = pack.path.name.removesuffix(ENDING)
        return (
            f"restore the packed file {pack.path} (git restore, or a copy of yours); or put its runs back into folders "
            f"(hadamard pack --undo {plan}.toml) and remove the folder {folder} to do the run again"
        )

    def _is_loose(self, key: str) -> bool:
        return (self.folder / key / RECORD).is_file()

    def _packs(self) -> dict[str, Pack]:
        """Packed runs: key -> its pack, the first by name that has it."""
        packs = reversed(packs_in(self.folder))
        return {key: pack for pack in packs for key in pack.names if self._shown(key)}

    def _pack_of(self, key: str) -> Pack | None:
        return next((pack for pack in packs_in(self.folder) if key in pack.names), None)

    def _folders(self) -> list[str]:
        """Names of the folders that are, or should be, those of runs."""
        if not self.folder.is_dir():
            return []
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
        return [name for name in names if name not in (FAILED, ASIDE) and self._shown(name)]

    def _shown(self, key: str) -> bool:
        return self._only is None or key in self._only
