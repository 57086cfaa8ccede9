"""A trained run that its store could not take: it goes to the caller with the error, and can be written elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hadamard_toolkit.errors import StoreError

if TYPE_CHECKING:
    from hadamard_toolkit.runs.record import Run
    from hadamard_toolkit.runs.store import RunStore


class UnsavedRunError(StoreError):
    """The run was trained, but could not be written to its store. `run` holds it, trained attachment included."""

    def __init__(self, run: Run, store: RunStore, reason: BaseException) -> None:
        self.run, self.store = run, store
        super().__init__(
            f"the run {run.key} is trained, but could not be written to store={str(store.folder)!r} "
            f"({type(reason).__name__}: {reason}); the attribute `run` of this error holds it"
        )


def rescue(error: BaseException) -> Path | None:
    """Write the run that `error`, or a cause of it, carries into a new temporary folder; the run's folder there.

    None where there is no run to save, or no place for it.
    """
    from hadamard_toolkit.runs.store import RunStore

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UnsavedRunError):
        cause = cause.__cause__
    if cause is None:
        return None
    try:
        place = RunStore(tempfile.mkdtemp(prefix="hadamard-unsaved-"), keep=cause.store.keep)
        return place.add(cause.run).folder
    except Exception:  # the disk that is full may be the only one
        return None
