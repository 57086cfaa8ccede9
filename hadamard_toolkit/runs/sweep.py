"""`sweep`: many specs, each done once, by one process, by several, or by a Ray cluster."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from hadamard_toolkit.errors import ArgumentError, DataError, ToolkitError, check_choice, check_range
from hadamard_toolkit.runs.bank import AUTO, Bank, Job, check_bank_size, jobs, run_bank, specs_of
from hadamard_toolkit.runs.environment import usable_cores
from hadamard_toolkit.runs.labels import describe
from hadamard_toolkit.runs.made_from import Here
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.rescue import rescue
from hadamard_toolkit.runs.run import record, run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore, as_store


class MissingExtraError(ToolkitError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class WorkerError(ToolkitError, RuntimeError):
    """A worker process died under a run."""


@dataclass(frozen=True)
class Attempt:
    """What became of one spec: `done`, `failed` (with the reason), `outdated` (a run is there, but made from other
    content than lies here) or `elsewhere` (another process has it)."""

    spec: RunSpec
    status: str
    reason: str = ""


Engine = Callable[[list[Job], RunStore, int | None], Iterator[Attempt]]


def sweep(
    specs: Iterable[RunSpec],
    store: RunStore | str | Path,
    engine: str = "inline",
    workers: int | None = None,
    *,
    bank: int | str = AUTO,
    report: Callable[[str], None] | None = None,
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
        up to 32 on a GPU, and none on a processor, where they are hardly faster. Each run is recorded as its own, and
        `train_info` says `bank`, or `bank_refused` with the reason why it was trained alone. A run in a bank is that
        run up to rounding and the dropout that is drawn; alone it has the bytes that `run` gives.
    report: called with one line of text per finished run, estimate of the end included, for logs; a progress bar
        shows the same in a terminal and in Jupyter.

    A run that fails is recorded with its reason (`RunStore.failed`) and does not stop the rest; the next sweep tries it
    again. A run whose record is damaged counts as failed and stays as it is; its reason says what to remove. A store
    that cannot be written to is a `StoreError` before the first run; a run that was trained and could not be written
    is saved to a folder that its reason names. Runs that another sweep over the same store has in hand are left to it.
    Interrupting loses only the runs in hand.

    Worker processes import this library afresh: tasks and adapters of your own must be registered by a module that
    they import, and a script must guard its sweep with `if __name__ == "__main__":`. Workers that cannot start are an
    `ArgumentError`.

    Returns a row per spec, in the order given: `key, backbone, task, label, seed, status, score, seconds, reason`, with
    `status` one of `present` (done before), `done`, `failed`, `outdated` (done before, but from other content than
    lies here now; see `RunStore.outdated`), `elsewhere`, and `score` the headline on test.
    """
    check_choice("engine", engine, ENGINES)
    if workers is not None:
        check_range("workers", workers, least=1, **({"most": 1} if engine == "inline" else {}))
    check_bank_size(bank)
    store, plan = as_store(store), list(dict.fromkeys(specs))
    if wrong := [spec for spec in plan if not isinstance(spec, RunSpec)]:
        raise ArgumentError(f"specs holds {wrong[0]!r}; every one must be a RunSpec")
    plan = [store.known(spec) for spec in plan]
    missing = [spec for spec in plan if spec not in store]
    if missing:
        store.check_writable()
    became = {spec: Attempt(spec, "present") for spec in plan if spec in store}
    here = Here()
    unfit = [attempt for spec in became if (attempt := _damaged(spec, store) or _outdated(spec, store, here))]
    attempts = chain(unfit, ENGINES[engine](jobs(missing, bank), store, workers))
    for attempt in _with_progress(attempts, len(unfit) + len(missing), report):
        became[attempt.spec] = attempt
    return pd.DataFrame([_summary(became[spec], store) for spec in plan], columns=list(_SUMMARY))


_SUMMARY = ("key", "backbone", "task", "label", "seed", "status", "score", "seconds", "reason")


def _summary(attempt: Attempt, store: RunStore) -> dict[str, Any]:
    spec, status, score, seconds = attempt.spec, attempt.status, float("nan"), float("nan")
    # also when the process that had it elsewhere has finished meanwhile
    if spec in store and status != "outdated" and not _damaged(spec, store):
        record = store.record(spec.key)
        status = "present" if status == "present" else "done"
        value = record["metrics"]["test"][record["headline"]]
        score, seconds = float("nan") if value is None else value, record["times"]["total"]
    fixed = (spec.key, spec.backbone, spec.task, describe(spec), spec.seed)
    return dict(zip(_SUMMARY, (*fixed, status, score, seconds, attempt.reason), strict=True))


def _damaged(spec: RunSpec, store: RunStore) -> Attempt | None:
    """A failed attempt where the record of a run that is there cannot be read; None where it can."""
    try:
        store.record(spec.key)
    except DataError as error:
        way_out = f"remove the folder {store.folder / spec.key} to do the run again"
        return Attempt(spec, "failed", f"{_one_line(error)}; {way_out}")
    return None


def _outdated(spec: RunSpec, store: RunStore, here: Here) -> Attempt | None:
    """An outdated attempt where a run that is there was made from other content than lies here now."""
    try:
        store.check_unchanged(spec, here=here)
    except DataError as error:
        return Attempt(spec, "outdated", _one_line(error))
    return None


def _with_progress(
    attempts: Iterator[Attempt], total: int, report: Callable[[str], None] | None
) -> Iterator[Attempt]:
    from hadamard_toolkit.training.progress import bar

    begun = time.monotonic()
    with bar(total=total, description="sweep", unit="run") as progress:
        for count, attempt in enumerate(attempts, start=1):
            progress.update()
            if report is not None:
                left = (time.monotonic() - begun) / count * (total - count)
                spec, reason = attempt.spec, f": {attempt.reason}" if attempt.reason else ""
                what = f"{spec.key} {spec.task} {describe(spec)} seed {spec.seed} {attempt.status}{reason}"
                report(
                    f"[{count}/{total}] {what}" + (f" (about {duration(left)} left)" if count < total else "")
                )
            yield attempt


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def attempt_run(spec: RunSpec, store: RunStore) -> Attempt:
    """Claim a spec, do it unless it is done, and never raise for a run that fails. This is what workers execute."""
    return attempt_bank(Bank((spec,)), store)[0]


def _failed(spec: RunSpec, error: Exception) -> Attempt:
    kept = rescue(error)
    return Attempt(spec, "failed", _one_line(error) + (f"; it is saved in {kept}" if kept else ""))


def attempt_bank(bank: Bank, store: RunStore) -> list[Attempt]:
    """The same for the runs of a bank, together if they are several."""
    became, mine = [], []
    with ExitStack() as claims:
        for spec in bank.specs:
            try:
                if not claims.enter_context(store.claim(spec)):
                    became.append(Attempt(spec, "elsewhere", "another process is at it"))
                elif spec in store:
                    became.append(Attempt(spec, "done"))
                else:
                    mine.append(spec)
            except Exception as error:
                became.append(_failed(spec, error))
        return became + _together(mine, store, bank.refused)


def _together(specs: list[RunSpec], store: RunStore, refused: str) -> list[Attempt]:
    """Claimed runs as a bank, as two where memory does not suffice, or one by one where they cannot be a bank."""
    import torch

    too_large = False
    if len(specs) > 1 and not refused:
        try:
            found = run_bank(specs)
            return [_recorded(spec, done, store) for spec, done in zip(specs, found, strict=True)]
        except torch.OutOfMemoryError:
            too_large = True  # to be dealt with outside of the block: the error holds what it is about
        except Exception as error:
            refused = _one_line(error)
        finally:
            gc.collect()
    if too_large:
        torch.cuda.empty_cache()
        half = len(specs) // 2
        return _together(specs[:half], store, "") + _together(specs[half:], store, "")
    return [_alone_here(spec, store, refused) for spec in specs]


def _recorded(spec: RunSpec, done: Run | Exception, store: RunStore) -> Attempt:
    try:
        if isinstance(done, Exception):
            store.add_failure(spec, done)
            raise done
        record(done, store)
    except Exception as error:
        return _failed(spec, error)
    done.attachment = None  # with it goes a whole model
    return Attempt(spec, "done")


def _alone_here(spec: RunSpec, store: RunStore, refused: str) -> Attempt:
    try:
        run(spec, store, **({"more": {"bank_refused": refused}} if refused else {}))
    except Exception as error:
        return _failed(spec, error)
    finally:
        gc.collect()  # hooks and modules refer to each other; a GPU should not have to wait for the collector
    return Attempt(spec, "done")


def _doing(job: Job) -> Callable[[Any, RunStore], Attempt | list[Attempt]]:
    return attempt_bank if isinstance(job, Bank) else attempt_run


def _attempt_job(job: Job, store: RunStore) -> list[Attempt]:
    return _each(_doing(job)(job, store))


def _each(result: Attempt | list[Attempt]) -> list[Attempt]:
    return result if isinstance(result, list) else [result]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# engines -------------------------------------------------------------------------------------------------------


def at_a_time(engine: str, workers: int | None, runs: int) -> int:
    """How many of so many runs `sweep` does at a time on this machine."""
    wanted = 1 if engine == "inline" else workers or _gpus() or max(1, usable_cores() // 2)
    return min(wanted, max(1, runs))


def _inline(jobs: list[Job], store: RunStore, workers: int | None) -> Iterator[Attempt]:
    for job in jobs:
        yield from _attempt_job(job, store)


def _processes(jobs: list[Job], store: RunStore, workers: int | None) -> Iterator[Attempt]:
    devices = _gpus()
    size = at_a_time("processes", workers, len(jobs))
    queue = deque(jobs)
    _check_main()
    while queue:
        in_hand: dict[Future[Any], Job] = {}
        with _workers(size, devices) as pool:
            begun = pool.submit(_nothing)
            try:
                while queue or in_hand:
                    while queue and len(in_hand) < size:  # no more, so that a dead worker leaves few suspects
                        in_hand[pool.submit(_doing(queue[0]), queue[0], store)] = queue[0]
                        queue.popleft()
                    for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        del in_hand[future]
                        yield from _each(result)
            except BrokenProcessPool:  # the suspects follow, one by one, unless no run has even begun
                if not begun.done() or begun.exception() is not None:
                    raise ArgumentError(
                        f"engine='processes' cannot start a worker process: {_GUARD}"
                    ) from None
        for job in in_hand.values():
            for spec in specs_of(job):
                yield _alone(spec, store, devices)


_GUARD = (
    "a worker imports the script that sweeps, so the script must guard its sweep with "
    "`if __name__ == \"__main__\":`; what a worker said stands above. Guard it, or use engine='inline'"
)


def _check_main() -> None:
    """Refuse a program that workers could not import: one that came from standard input."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is not None and getattr(main, "__spec__", None) is None and not os.path.isfile(path):
        raise ArgumentError(
            f"engine='processes' is not allowed in a program from {Path(path).name}: a worker imports the script that "
            "sweeps, so it must be a file; write it to one, or use engine='inline'"
        )


def _nothing() -> None:
    """What a worker does first: an answer proves that it could start."""


def _alone(spec: RunSpec, store: RunStore, devices: int) -> Attempt:
    """A run in a process of its own: if that dies too, the run is to blame."""
    with _workers(1, devices) as pool:
        try:
            return pool.submit(attempt_run, spec, store).result()
        except BrokenProcessPool:
            error = WorkerError("the worker process died (killed from outside, or out of memory)")
            store.add_failure(spec, error)
            return Attempt(spec, "failed", _one_line(error))


@contextmanager
def _workers(size: int, devices: int) -> Iterator[ProcessPoolExecutor]:
    """A pool; where the block is interrupted, its workers end at once instead of finishing the runs in hand."""
    others = set(multiprocessing.active_children())
    pool = _pool(size, devices)
    try:
        yield pool
    except (KeyboardInterrupt, GeneratorExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(size: int, devices: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    slots = context.SimpleQueue()
    for worker in range(size):
        slots.put(worker % devices if devices else None)
    threads = max(1, usable_cores() // size)
    return ProcessPoolExecutor(size, mp_context=context, initializer=_start_worker, initargs=(threads, slots))


def _start_worker(threads: int, slots: Any) -> None:
    """One GPU and a share of the cores for this worker, whose own progress bars would only garble the sweep's."""
    # Ctrl-C in a terminal reaches all processes; the sweep ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["HADAMARD_PROGRESS"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    device = slots.get()
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[device] if names else str(device)
    import torch

    torch.set_num_threads(threads)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _ray(jobs: list[Job], store: RunStore, workers: int | None) -> Iterator[Attempt]:
    try:
        import ray
    except ImportError:
        raise MissingExtraError(
            "engine='ray' needs Ray; install it with: pip install hadamard_toolkit[ray]"
        ) from None

    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    size = workers or gpus or max(1, cpus // 2)
    # Ray runs as many tasks at a time as their shares fit the cluster, and gives each OMP_NUM_THREADS by its CPUs.
    # A run uses one GPU or a part of one; Ray counts parts to four decimals.
    share = int(min(1.0, gpus / size) * 10_000) / 10_000
    task = ray.remote(
        num_cpus=max(1, cpus // size),
        num_gpus=share,
        max_retries=0,
        runtime_env={"env_vars": {"HADAMARD_PROGRESS": "0"}},
    )(_attempt_job)
    shared = RunStore(store.folder.resolve(), keep=store.keep)
    pending = {task.remote(job, shared): job for job in jobs}
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        for reference in ready:
            job = pending.pop(reference)
            try:
                yield from ray.get(reference)
            except ray.exceptions.RayError as error:  # the worker died, or the machine under it
                for spec in specs_of(job):
                    store.add_failure(spec, error)
                    yield Attempt(spec, "failed", _one_line(error))


ENGINES: dict[str, Engine] = {"inline": _inline, "processes": _processes, "ray": _ray}
