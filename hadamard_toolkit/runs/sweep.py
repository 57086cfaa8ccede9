"""`sweep`: many specs, each done once, by one process, by several, or by a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_number, check_whole
from hadamard_toolkit.runs.bank import AUTO, banks, check_bank_size
from hadamard_toolkit.runs.engines import ENGINES, Attempt, one_line
from hadamard_toolkit.runs.estimate import duration
from hadamard_toolkit.runs.labels import describe
from hadamard_toolkit.runs.made_from import Here
from hadamard_toolkit.runs.schedule import Clock, Schedule
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore, as_store


def sweep(
    specs: Iterable[RunSpec],
    store: RunStore | str | Path,
    engine: str = "inline",
    workers: int | None = None,
    *,
    bank: int | str = AUTO,
    minutes: float | None = None,
    report: Callable[[str], None] | None = None,
    clock: Clock = time.monotonic,
) -> pd.DataFrame:
    """Do the runs of `specs` that `store` lacks, and say what became of each.

    Parameters
    ----------
    engine: `"inline"`: one after the other, here. `"processes"`: in `workers` processes of this machine, each with
        a GPU of its own (where there are any) and its share of the cores. `"ray"`: as tasks of a Ray cluster
        (`pip install hadamard_toolkit[ray]`; `RAY_ADDRESS` names it), `workers` at a time; the store must be on
        a file system that all its machines share.
    workers: runs at a time; None: one per GPU, or one per two cores where there is none.
    bank: how many runs that fit together (the same backbone, adapter, shape of the head and size of batch; any seeds,
        rates, epochs and tasks) are trained in one pass at most, see `training.bank`; 1: none. `"auto"` forms banks of
        up to 64 on a GPU, as far as its memory allows, and none on a processor, where they are hardly faster. Each run
        is recorded as its own, and `train_info` says `bank`, or `bank_refused` with the reason why it was trained
        alone. A run in a bank is that run up to rounding and the dropout that is drawn; alone it has the bytes that
        `run` gives.
    minutes: a limit of time. Runs are trained in the order of `specs`, so put the most valuable first. A run or bank is
        not started if it would not end in time, by the measured times of those like it; one that has been started ends.
        What was left has the status `left`, and the same call does it later.
    report: called with one line of text per finished run, with the rate and an estimate of the end, for logs; a
        progress bar shows the same in a terminal and in Jupyter.
    clock: gives seconds, for tests.

    A run that fails is recorded with its reason (`RunStore.failed`) and does not stop the rest; the next sweep tries it
    again. A run whose record is damaged counts as failed and stays as it is; its reason says what to do. A store that
    cannot be written to is a `StoreError` before the first run. A run that was trained and could not be written is
    saved to a folder that its reason names. Runs that another sweep over the same store is doing are left to it.
    Interrupting loses only the runs that are being trained.

    Worker processes import this library afresh: tasks and adapters of your own must be registered by a module that
    they import, and a script must guard its sweep with `if __name__ == "__main__":`. Workers that cannot start are an
    `ArgumentError`.

    Returns a row per spec, in the order given: `key, backbone, task, label, seed, status, score, seconds, reason`. The
    `status` is `present` (done before), `done`, `failed`, `outdated` (done before, but from other content than is here
    now; see `RunStore.outdated`), `elsewhere` or `left`; `score` is the headline metric on test.
    """
    check_choice("engine", engine, ENGINES)
    check_whole("workers", workers, least=1, most=1 if engine == "inline" else None, optional=True)
    check_number("minutes", minutes, above=0, optional=True)
    check_bank_size(bank)
    store, specs = as_store(store), list(dict.fromkeys(specs))
    if wrong := [spec for spec in specs if not isinstance(spec, RunSpec)]:
        raise ArgumentError(f"specs holds {wrong[0]!r}; every one must be a RunSpec")
    specs = [store.known(spec) for spec in specs]
    missing = [spec for spec in specs if spec not in store]
    if missing:
        store.check_writable()
    schedule = Schedule(banks(missing, bank, in_order=minutes is not None), minutes, clock)
    outcomes = {spec: Attempt(spec, "present") for spec in specs if spec in store}
    here = Here()
    unusable = [attempt for spec in outcomes if (attempt := _unusable(spec, store, here))]
    outcomes |= {
        spec: Attempt(spec, "left", f"it would not end within {minutes} minutes") for spec in missing
    }
    attempts = chain(unusable, ENGINES[engine](schedule, store, workers))
    for attempt in _with_progress(attempts, len(unusable) + len(missing), report, clock, schedule):
        outcomes[attempt.spec] = attempt
        if attempt.status == "done":
            schedule.note(attempt.spec)
    return pd.DataFrame([_summary(outcomes[spec], store) for spec in specs], columns=list(COLUMNS))


COLUMNS = ("key", "backbone", "task", "label", "seed", "status", "score", "seconds", "reason")


def _unusable(spec: RunSpec, store: RunStore, here: Here) -> Attempt | None:
    """What is wrong with a run that is there: its record is damaged, or it was made from other content; or None."""
    try:
        store.record(spec.key)
    except DataError as error:
        return Attempt(spec, "failed", f"{one_line(error)}; {store.way_out(spec.key)}")
    try:
        store.check_unchanged(spec, here=here)
    except DataError as error:
        return Attempt(spec, "outdated", one_line(error))
    return None


def _summary(attempt: Attempt, store: RunStore) -> dict[str, Any]:
    spec, status, score, seconds = attempt.spec, attempt.status, float("nan"), float("nan")
    if status != "outdated":
        # There may be no record; and a run that another process was doing may have finished meanwhile.
        with suppress(DataError):
            record = store.record(spec.key)
            status = "present" if status == "present" else "done"
            value = record["metrics"]["test"][record["headline"]]
            score, seconds = float("nan") if value is None else value, record["times"]["total"]
    values = (spec.key, spec.backbone, spec.task, describe(spec), spec.seed, status, score, seconds)
    return dict(zip(COLUMNS, (*values, attempt.reason), strict=True))


def _with_progress(
    attempts: Iterator[Attempt],
    total: int,
    report: Callable[[str], None] | None,
    clock: Clock,
    schedule: Schedule,
) -> Iterator[Attempt]:
    from hadamard_toolkit.training.progress import bar

    start, done = clock(), 0
    with bar(total=total, description="sweep", unit="run") as progress:
        for count, attempt in enumerate(attempts, start=1):
            seconds, done = max(clock() - start, 1e-9), done + (attempt.status == "done")
            rate = f"{60 * done / seconds:.2f} runs per minute"
            progress.set_postfix_str(rate, refresh=False)
            progress.update()
            if report is not None:
                left = min(seconds / count * (total - count), schedule.remaining())
                spec, reason = attempt.spec, f": {attempt.reason}" if attempt.reason else ""
                what = f"{spec.key} {spec.task} {describe(spec)} seed {spec.seed} {attempt.status}{reason}"
                ahead = f", about {duration(max(0, left))} left" if count < total else ""
                report(f"[{count}/{total}] {what} ({rate}{ahead})")
            yield attempt
