"""A folder of runs: one folder per run, named by its key, or several runs in a packed file."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from hadamard_toolkit.errors import ArgumentError, DataError, StoreError, check_choice
from hadamard_toolkit.paths import atomic_folder, atomic_write, remove_leftovers
from hadamard_toolkit.runs.environment import describe_error
from hadamard_toolkit.runs.labels import describe
from hadamard_toolkit.runs.made_from import Here, sources_of
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.record import KEEP, RECORD, Run, read_run, stored_vectors, write_run
from hadamard_toolkit.runs.shelf import ASIDE, CLAIMS, FAILED, SOURCES, Shelf
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.table import COLUMNS, tidy

if TYPE_CHECKING:
    from hadamard_toolkit.sparsity.masks import Masks

MEASURED = "measured"  # folder of a run
PROBE = 1 << 20  # bytes that a store must have room for before a run is trained for it


class RunStore(Shelf):
    """The runs in `folder`, which is made with the first one. Present means done: no index, no server, no database.

    Many processes may read and write one store at a time. `keep` says which runs keep their trained weights; the
    other files of a run, also its masks, are always kept:

    - `"vectors"`: runs whose adapter is made of vectors (Hadamard, (IA)³, norms, biases, the head alone); such a
      store is small enough to commit.
    - `"adapters"`: all but those that train the whole backbone.
    - `"everything"`: those too (90 MB each for MiniLM).
    - `"nothing"`: none; for runs made for their scores, such as those that pick a learning rate.

    Weights that a fusion needs and `keep` leaves out are in `.sources`, which may be deleted at any time.
    """

    def __init__(self, folder: str | Path, *, keep: str = "adapters") -> None:
        if folder == "":  # as of a variable that is not set
            raise ArgumentError("folder='' is not allowed; name a folder, or say '.' for this one")
        super().__init__(Path(folder).expanduser())
        check_choice("keep", keep, KEEP)
        self.keep = keep
        for path in (self.folder, *self.folder.parents):
            if os.path.isfile(path):
                what = "it is a file" if path == self.folder else f"{path} is a file"
                raise ArgumentError(f"folder={str(folder)!r} is not allowed; {what}, and a store is a folder")

    def only(self, runs: Iterable[RunSpec | str] | str | Path) -> RunStore:
        """The part of this store that holds these runs alone: specs, keys, or the path of a plan file.

        store.only("data/reference_runs/spine.toml").load()
        """
        if isinstance(runs, str | Path):
            runs = load_plan(runs)
        keys = (self.known(run).key if isinstance(run, RunSpec) else self.resolve(run) for run in runs)
        part = RunStore(self.folder, keep=self.keep)
        part._only = frozenset(keys)
        return part

    def __repr__(self) -> str:
        return f"RunStore({str(self.folder)!r}, {len(self)} runs)"

    # reading ---------------------------------------------------------------------------------------------------

    def run(self, key: str) -> Run:
        """The run with this key, or with the only key that begins so. `ArgumentError` for none or several."""
        run = read_run(self.folder_of(key))
        run.store = self.folder
        return run

    def vectors(self, key: str) -> dict[str, np.ndarray]:
        """Trained vectors of a run, stacked over layers, without loading a backbone; see `Attachment.vectors`."""
        return stored_vectors(self.folder_of(key))

    def masks(self, key: str) -> Masks:
        """Masks of a sparse run, from its files alone; `ArgumentError` for a run without masks."""
        from hadamard_toolkit.sparsity.masks import Masks

        return Masks.load(self.folder_of(key))

    def load(self) -> pd.DataFrame:
        """All runs as one tidy table: a row per run, split and metric.

        `value` is in natural units and `headline` marks the task's own metric. `n` is the number of rows scored,
        `train_rows` that of rows trained on, and `subset` says whether the data here, or the rows scored, are less
        than the official ones. `trained`, `stored` and `nonzero` count parameters without the head,
        `…_with_head` with it, `…_<role>` by role. `adapter`, `protocol` and `sparsity` are JSON text, `label` the
        adapter (and its pruning) as code. `seconds` is the whole run. A folder that is no run is skipped with a
        warning that names it. `DataError` where the store's folder is not there.
        """
        if not os.path.isdir(self.folder):
            raise DataError(f"store={str(self.folder)!r} is not there; it is made with its first run")
        rows: list[dict[str, Any]] = []
        packs = self._packs()
        for key in sorted({*packs, *self._folders()}):
            try:
                rows += tidy(self._record(key, packs.get(key)))
            except DataError as error:
                warnings.warn(f"skipped {self.folder / key}: {error}", stacklevel=2)
            except (KeyError, TypeError, AttributeError) as error:
                reason = f"{RECORD} is not that of a run ({type(error).__name__}: {error})"
                warnings.warn(f"skipped {self.folder / key}: {reason}", stacklevel=2)
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype(
            {"headline": bool, "subset": bool, "value": float}
        )

    def wide(self) -> pd.DataFrame:
        """One row per run: what `load` says of it, and one column per split and metric, such as `test/accuracy`."""
        rows = self.load()
        fixed = rows.drop(columns=["split", "metric", "headline", "value", "n", "subset"]).drop_duplicates(
            "key"
        )
        values = rows.assign(name=rows["split"] + "/" + rows["metric"]).pivot(
            index="key", columns="name", values="value"
        )
        return fixed.set_index("key").join(values)

    def failed(self) -> pd.DataFrame:
        """Runs that failed and were not done since: key, backbone, task, label, seed, error, message, when.

        A note that cannot be read is skipped with a warning that names it.
        """
        columns = ["key", "backbone", "task", "label", "seed", "error", "message", "when"]
        flat = []
        for path in sorted((self.folder / FAILED).glob("*.json")):
            if self._shown(path.stem):
                try:
                    note = json.loads(path.read_text("utf-8"))
                    row = {**note["spec"], **note}
                    flat.append({name: row[name] for name in columns})
                except (OSError, ValueError, KeyError, TypeError) as error:
                    reason = f"it is not the note of a failed run ({type(error).__name__}: {error})"
                    warnings.warn(f"skipped {path}: {reason}", stacklevel=2)
        return pd.DataFrame(flat, columns=columns)

    def check_unchanged(self, run: RunSpec | str, *, here: Here | None = None) -> None:
        """Raise `DataError` if a run of this store was made from other content than is here now; see `outdated`.

        `here` is what several checks share, so that each backbone and task is looked at once.
        """
        here = here or Here()
        record = self.record(run.key if isinstance(run, RunSpec) else self.resolve(run))
        spec = record["spec"]
        here.require_same(record["key"], record.get("meta_info", {}), spec["backbone"], spec["task"])
        for source in sources_of(record):
            if source in self:
                self.check_unchanged(source, here=here)

    def outdated(self) -> pd.DataFrame:
        """Runs made from other content than is here now: key, backbone, task, label, seed, reason.

        Compared are the backbone (weights, config, vocabulary) and the data, labels and metric of the tasks, as far as
        the record holds them and they are on this machine, and so are the runs whose adapters a run fuses. `set_aside`
        makes room for such runs to be done again.
        """
        here, records, reasons = Here(), {}, {}
        for key in self.keys():
            try:
                records[key] = self.record(key)
            except DataError as error:
                warnings.warn(f"skipped {self.folder / key}: {error}", stacklevel=2)
        for key, record in records.items():
            if changes := here.changes_of(record):
                reasons[key] = "; ".join(changes)
        for key, record in records.items():
            if stale := [source for source in sources_of(record) if source in reasons]:
                reasons.setdefault(key, f"it builds on run {stale[0]}: {reasons[stale[0]]}")
        rows = [{**records[key]["spec"], **records[key], "reason": reasons[key]} for key in sorted(reasons)]
        return pd.DataFrame(rows, columns=["key", "backbone", "task", "label", "seed", "reason"])

    def set_aside(self, keys: Iterable[str]) -> Path:
        """Move these runs into the folder `aside` of the store, where they no longer count; nothing is deleted.

        Weights that the store kept for fusions over these runs go with them. Returns that folder. A run comes back
        when its folder there, `<key>.1`, is moved to `<key>` in the store.
        """
        keys = [self.resolve(key) for key in keys]
        if packed := [key for key in keys if not self._is_loose(key)]:
            raise ArgumentError(
                f"key={packed[0]!r} is a packed run; put its plan back into folders first "
                "(hadamard pack --undo PLAN.toml)"
            )
        aside = self.folder / ASIDE
        try:
            aside.mkdir(exist_ok=True)
            for key in keys:
                numbered = (aside / f"{key}.{number}" for number in itertools.count(1))
                target = next(path for path in numbered if not path.exists())
                (self.folder / key).rename(target)
                if (self.folder / SOURCES / key).is_dir():
                    (self.folder / SOURCES / key).rename(target / SOURCES)
        except OSError as error:
            raise self._unwritable(error) from error
        return aside

    def measured(self, key: str, name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table `name` that was measured on a finished run, or what `measure()` gives, written beside the run.

        Studies ask the same run many things (its score without layer 3, its attention norms); each is measured once.
        `name` is a file name without ending. The table comes back from its file either way, with plain columns.
        """
        key, file = self.resolve(key), f"{MEASURED}/{name}.json"
        path = self.folder / key / file
        if not path.is_file() and self.has(key, file):
            path = self.folder_of(key) / file
        if not path.is_file():
            table = json.loads(measure().to_json(orient="split", index=False, double_precision=9))
            lines = ",\n".join(json.dumps(row) for row in table["data"])
            try:
                atomic_write(path, f'{{"columns": {json.dumps(table["columns"])}, "data": [\n{lines}\n]}}\n')
            except OSError as error:  # what was measured is worth having all the same
                warnings.warn(f"{path} cannot be written, so {name} is not kept: {error}", stacklevel=2)
                return pd.DataFrame(**table)
        return pd.DataFrame(**json.loads(path.read_text("utf-8")))

    # writing ---------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise `StoreError` unless the folder can be made and takes a file of some size now."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(bytes(PROBE))
                probe.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"store={str(self.folder)!r} cannot be written to: {error.strerror or error}; "
            "choose another folder, or make this one writable with some room on its disk"
        )

    def add(self, run: Run) -> Run:
        """Write a freshly trained run, wholly or not at all, and forget an earlier failure of it."""
        remove_leftovers(self.folder)
        target = self.folder / run.key
        with atomic_folder(target) as staging:
            write_run(run, staging, keep=self.keep)
        (self.folder / FAILED / f"{run.key}.json").unlink(missing_ok=True)
        run.folder, run.store = target, self.folder
        return run

    def add_failure(self, spec: RunSpec, error: BaseException) -> None:
        """Note under `failed/<key>.json` why a run failed; a later success removes the note.

        Where the note cannot be written, a warning says so: it must not take the place of the failure itself.
        """
        note = {
            "schema": 1,
            "key": spec.key,
            "spec": spec.to_dict(),
            "label": describe(spec),
            **describe_error(error),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path = self.folder / FAILED / f"{spec.key}.json"
        try:
            atomic_write(path, json.dumps(note, indent=1, sort_keys=True) + "\n")
        except OSError as problem:
            warnings.warn(f"{path} cannot be written: {problem}", stacklevel=2)

    @contextmanager
    def claim(self, spec: RunSpec) -> Iterator[bool]:
        """Whether the caller alone may do this run now; held until the block ends.

        The claim is a lock of the operating system on `.claims/<key>`: two sweeps over one store never do a run
        twice, and the claim of a process that died, however it died, is gone with it. `StoreError` where a claim
        cannot be written.
        """
        path = self.folder / CLAIMS / spec.key
        lock = FileLock(path, blocking=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield True
        finally:
            lock.release()


def as_store(store: RunStore | str | Path) -> RunStore:
    """A store as it is, or the store in a folder."""
    return store if isinstance(store, RunStore) else RunStore(store)
