from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, ToolkitError
from hadamard_toolkit.runs import engines as module
from hadamard_toolkit.runs.bank import Bank
from hadamard_toolkit.runs.engines import Attempt, attempt
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep

MakeSpec = Callable[..., RunSpec]
BROKEN = ht.Hadamard(layers=(9,))  # the tiny backbone has three layers


def kills_its_worker(bank: Bank, store: RunStore) -> list[Attempt]:
    """Does runs as usual, except that seed 1 takes its process down, once another run is done."""
    if bank.specs[0].seed != 1:
        return attempt(bank, store)
    while not len(store):
        time.sleep(0.05)
    os._exit(9)


def test_processes_share_the_work_and_survive_a_dead_worker(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "attempt", kills_its_worker)
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (1, 0)]
    store = RunStore(tmp_path / "runs")
    table = sweep(specs, store, engine="processes", workers=2)
    assert table["status"].tolist() == ["failed", "done"]
    assert table["reason"][0].startswith("WorkerError: the worker process died")
    assert store.failed()["seed"].tolist() == [1]
    threads = store.run(specs[1].key).info["meta_info"]["device"]["threads"]
    assert threads == max(1, module.usable_cores() // 2)


def test_as_many_at_a_time_as_there_are_cards_or_else_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert module.at_a_time("processes", None, 10) == 4
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    assert module.at_a_time("processes", None, 10) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert module.at_a_time("processes", None, 10) == 3
    assert module.at_a_time("processes", 5, 10) == 5
    assert module.at_a_time("processes", 5, 2) == 2
    assert module.at_a_time("processes", 5, 0) == 1
    assert module.at_a_time("inline", None, 10) == 1


class FragilePool:
    """A pool in this process that breaks, as a real one does, when seed 1 is run in it."""

    def __init__(self, size: int, devices: int) -> None:
        self.broken = False

    def submit(self, function: Any, bank: Bank | None = None, store: RunStore | None = None) -> Future[Any]:
        if self.broken:
            raise BrokenProcessPool
        future: Future[Any] = Future()
        specs = bank.specs if bank else ()
        self.broken = any(spec.seed == 1 for spec in specs)
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result([Attempt(spec, "done") for spec in specs])
        return future

    def shutdown(self, **ignored: bool) -> None:
        pass

    def __enter__(self) -> FragilePool:
        return self

    def __exit__(self, *ignored: object) -> None:
        pass


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_only_the_run_that_kills_its_process_is_blamed(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "_pool", FragilePool)
    banks = [Bank((make_spec(seed=seed),)) for seed in (0, 1, 2, 3, 4)]
    attempts = list(module._processes(banks, RunStore(tmp_path / "runs"), workers))
    assert {attempt.spec.seed: attempt.status for attempt in attempts} == {
        seed: "failed" if seed == 1 else "done" for seed in range(5)
    }
    assert len(attempts) == 5


def sleeps(bank: Bank, store: RunStore) -> list[Attempt]:
    """A run of a minute."""
    time.sleep(60)
    return [Attempt(spec, "done") for spec in bank.specs]


def light_pool(size: int, devices: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"))


def test_interrupt_ends_the_workers_at_once(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pool", light_pool)
    monkeypatch.setattr(module, "attempt", sleeps)
    monkeypatch.setattr(module, "wait", interrupted)
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    own.start()
    others, begun = set(multiprocessing.active_children()), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep([make_spec()], tmp_path, engine="processes", workers=1)
        own.join(1)
        assert time.monotonic() - begun < 50
        assert set(multiprocessing.active_children()) == others, "the caller's own process goes on"
    finally:
        own.kill()
        own.join()


def pool_that_cannot_start(size: int, devices: int) -> ProcessPoolExecutor:
    """Its workers die before their first task, as those of a script without a main guard do."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(size, mp_context=context, initializer=os._exit, initargs=(1,))


def test_workers_that_cannot_start_are_one_error_and_no_failed_runs(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_pool", pool_that_cannot_start)
    with pytest.raises(ArgumentError, match=r"engine='processes' cannot start .*__main__.*engine='inline'"):
        sweep([make_spec(), make_spec(seed=1)], tmp_path, engine="processes", workers=1)
    assert RunStore(tmp_path).failed().empty


def test_processes_are_refused_in_a_program_from_standard_input(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ModuleType("__main__")
    program.__file__ = str(tmp_path / "<stdin>")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(module, "_pool", lambda *arguments: pytest.fail("tried all the same"))
    with pytest.raises(ArgumentError, match=r"engine='processes' is not allowed in a program from <stdin>"):
        sweep([make_spec()], tmp_path, engine="processes", workers=1)
    assert RunStore(tmp_path).failed().empty


@pytest.mark.parametrize(
    ("visible", "slot", "expected"),
    [("3,5", 1, "5"), ("", 1, "1"), ("GPU-a,GPU-b", 0, "GPU-a"), ("3", None, "3")],
)
def test_worker_sees_one_gpu_and_its_share_of_cores(
    monkeypatch: pytest.MonkeyPatch, visible: str, slot: int | None, expected: str
) -> None:
    threads, on_interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    for name, value in (
        ("CUDA_VISIBLE_DEVICES", visible),
        ("OMP_NUM_THREADS", "7"),
        ("HADAMARD_PROGRESS", "1"),
    ):
        monkeypatch.setenv(name, value)
    try:
        module._start_worker(1, SimpleNamespace(get=lambda: slot))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        assert (torch.get_num_threads(), os.environ["HADAMARD_PROGRESS"]) == (1, "0")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # whoever sweeps ends its workers
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        torch.set_num_threads(threads)


class FakeRay:
    """The part of Ray's documented interface that the engine uses, run in this process."""

    class RayError(Exception):
        pass

    def __init__(self, gpus: float, cpus: float) -> None:
        self.resources = {"GPU": gpus, "CPU": cpus}
        self.options: dict[str, Any] = {}
        self.started = False
        self.exceptions = SimpleNamespace(RayError=self.RayError)

    def init(self) -> None:
        self.started = True

    def is_initialized(self) -> bool:
        return self.started

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        function, (bank, store) = reference
        if bank.specs[0].seed == 1:
            raise self.RayError("node died")
        return function(bank, store)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def install(gpus: float, cpus: float) -> FakeRay:
        fake = FakeRay(gpus, cpus)
        monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
        return fake

    return install


def test_ray_does_the_runs_and_records_lost_ones(
    make_spec: MakeSpec, tmp_path: Path, ray: Callable[..., FakeRay]
) -> None:
    fake = ray(gpus=0, cpus=8)
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (0, 1)]
    table = sweep(specs, tmp_path / "runs", engine="ray", workers=4)
    assert fake.started
    assert (fake.options["num_cpus"], fake.options["num_gpus"]) == (2, 0)
    assert table["status"].tolist() == ["done", "failed"]
    assert "node died" in RunStore(tmp_path / "runs").failed()["message"][0]


@pytest.mark.parametrize(("gpus", "workers", "share"), [(2, None, 1), (2, 1, 1), (1, 3, 0.3333), (4, 8, 0.5)])
def test_ray_shares_gpus(
    make_spec: MakeSpec,
    tmp_path: Path,
    ray: Callable[..., FakeRay],
    gpus: int,
    workers: int | None,
    share: float,
) -> None:
    fake = ray(gpus=gpus, cpus=16)
    sweep([make_spec(adapter=BROKEN)], tmp_path, engine="ray", workers=workers)
    assert fake.options["num_gpus"] == share
    assert fake.options["num_cpus"] * (workers or gpus) <= 16


def test_missing_ray_names_the_extra(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolkitError, match=r"pip install hadamard_toolkit\[ray\]") as caught:
        sweep([make_spec()], tmp_path, engine="ray")
    assert isinstance(caught.value, ImportError)
