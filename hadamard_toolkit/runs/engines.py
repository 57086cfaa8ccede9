"""How the runs of a sweep are done: one attempt at each, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hadamard_toolkit.errors import ArgumentError, MissingExtraError, ToolkitError
from hadamard_toolkit.paths import PREPARED
from hadamard_toolkit.runs.bank import Bank, kind_of, run_bank
from hadamard_toolkit.runs.environment import usable_cores
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import record, rescue, run
from hadamard_toolkit.runs.schedule import Schedule
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore


class WorkerError(ToolkitError, RuntimeError):
    """A worker process died under a run."""


@dataclass(frozen=True)
class Attempt:
    """What became of one spec.

    `status` is `present`, `done`, `failed` (with the reason), `outdated` (a run is there, but made from other content
    than is here), `elsewhere` (another process is doing it) or `left` (there was no time for it).
    """

    spec: RunSpec
    status: str
    reason: str = ""


# Banks are taken one by one, each when there is a worker for it: a schedule gives none when its time is over.
Banks = list[Bank] | Schedule
Engine = Callable[[Banks, RunStore, int | None], Iterator[Attempt]]


def attempt(bank: Bank, store: RunStore) -> list[Attempt]:
    """Claim the runs of a bank and do those that are not done, together if they are several.

    This is what workers execute; it never raises for a run that fails.
    """
    attempts, claimed = [], []
    with ExitStack() as claims:
        for spec in bank.specs:
            try:
                if not claims.enter_context(store.claim(spec)):
                    attempts.append(Attempt(spec, "elsewhere", "another process is doing it"))
                elif spec in store:
                    attempts.append(Attempt(spec, "done"))
                else:
                    claimed.append(spec)
            except Exception as error:
                attempts.append(_failed(spec, error))
        return attempts + _together(claimed, store, bank.refused)


def attempt_run(spec: RunSpec, store: RunStore) -> Attempt:
    """The same for a run of its own."""
    return attempt(Bank((spec,)), store)[0]


_fitting: dict[str, int] = {}  # how many runs of a kind this process tries at once, after more were too many


def _together(specs: list[RunSpec], store: RunStore, refused: str) -> list[Attempt]:
    """Claimed runs as a bank, as two where memory does not suffice, or one by one where they cannot be a bank."""
    import torch

    kind = kind_of(specs[0]) if len(specs) > 1 and not refused else ""
    too_large = len(specs) > _fitting.get(kind, len(specs))
    if kind and not too_large:
        try:
            finished = run_bank(specs)
            return [_recorded(spec, done, store) for spec, done in zip(specs, finished, strict=True)]
        except torch.OutOfMemoryError:
            too_large = True  # dealt with below: inside this block the error keeps its tensors alive
            _fitting[kind] = len(specs) // 2
        except Exception as error:
            refused = one_line(error)
        finally:
            gc.collect()
    if too_large:
        torch.cuda.empty_cache()
        half = len(specs) // 2
        return _together(specs[:half], store, "") + _together(specs[half:], store, "")
    return [_run_here(spec, store, refused) for spec in specs]


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


def _run_here(spec: RunSpec, store: RunStore, refused: str) -> Attempt:
    try:
        run(spec, store, **({"more": {"bank_refused": refused}} if refused else {}))
    except Exception as error:
        return _failed(spec, error)
    finally:
        gc.collect()  # hooks and modules refer to each other; a GPU should not have to wait for the collector
    return Attempt(spec, "done")


def _failed(spec: RunSpec, error: Exception) -> Attempt:
    saved = rescue(error)
    return Attempt(spec, "failed", one_line(error) + (f"; it is saved in {saved}" if saved else ""))


def one_line(error: BaseException) -> str:
    """Class and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def at_a_time(engine: str, workers: int | None, runs: int) -> int:
    """How many of `runs` runs `sweep` does at a time on this machine."""
    wanted = 1 if engine == "inline" else workers or _gpus() or max(1, usable_cores() // 2)
    return min(wanted, max(1, runs))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _inline(banks: Banks, store: RunStore, workers: int | None) -> Iterator[Attempt]:
    for bank in banks:
        yield from attempt(bank, store)


# worker processes ----------------------------------------------------------------------------------------------

_GUARD = (
    "a worker imports the script that sweeps, so the script must guard its sweep with "
    "`if __name__ == \"__main__\":`; the error of a worker is printed above. Guard it, or use engine='inline'"
)


def _processes(banks: Banks, store: RunStore, workers: int | None) -> Iterator[Attempt]:
    devices = _gpus()
    size = at_a_time("processes", workers, len(banks))
    upcoming, bank = iter(banks), None
    _check_main()
    while bank := bank or next(upcoming, None):
        in_hand: dict[Future[list[Attempt]], Bank] = {}
        with _workers(size, devices) as pool:
            started = pool.submit(_nothing)
            try:
                while True:
                    # No more than `size`, so that a dead worker leaves few suspects.
                    while len(in_hand) < size and (bank := bank or next(upcoming, None)):
                        in_hand[pool.submit(attempt, bank, store)] = bank
                        bank = None
                    if not in_hand:
                        break
                    for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                        attempts = future.result()
                        del in_hand[future]
                        yield from attempts
            except BrokenProcessPool:  # the suspects follow, one by one, unless no worker could start
                if not started.done() or started.exception() is not None:
                    raise ArgumentError(
                        f"engine='processes' cannot start a worker process: {_GUARD}"
                    ) from None
        for suspect in in_hand.values():
            for spec in suspect.specs:
                yield _alone(spec, store, devices)


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
            return pool.submit(attempt, Bank((spec,)), store).result()[0]
        except BrokenProcessPool:
            error = WorkerError("the worker process died (killed from outside, or out of memory)")
            store.add_failure(spec, error)
            return Attempt(spec, "failed", one_line(error))


@contextmanager
def _workers(size: int, devices: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers end at once, without finishing their runs, when the block is interrupted."""
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


# a Ray cluster -------------------------------------------------------------------------------------------------


def _ray(banks: Banks, store: RunStore, workers: int | None) -> Iterator[Attempt]:
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
    prepared = {PREPARED: os.environ[PREPARED]} if PREPARED in os.environ else {}
    share = int(min(1.0, gpus / size) * 10_000) / 10_000
    task = ray.remote(
        num_cpus=max(1, cpus // size),
        num_gpus=share,
        max_retries=0,
        runtime_env={"env_vars": {"HADAMARD_PROGRESS": "0", **prepared}},
    )(attempt)
    shared = RunStore(store.folder.resolve(), keep=store.keep)
    upcoming, pending = iter(banks), dict[Any, Bank]()
    while True:
        pending |= {task.remote(bank, shared): bank for bank in islice(upcoming, size - len(pending))}
        if not pending:
            return
        ready, _ = ray.wait(list(pending), num_returns=1)
        for reference in ready:
            bank = pending.pop(reference)
            try:
                yield from ray.get(reference)
            except ray.exceptions.RayError as error:  # the worker died, or the machine under it
                for spec in bank.specs:
                    store.add_failure(spec, error)
                    yield Attempt(spec, "failed", one_line(error))


ENGINES: dict[str, Engine] = {"inline": _inline, "processes": _processes, "ray": _ray}
