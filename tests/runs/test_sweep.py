from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
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
from hadamard_toolkit.errors import ArgumentError, StoreError, ToolkitError
from hadamard_toolkit.runs import sweep as module
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import Attempt, attempt_run, duration, sweep

MakeSpec = Callable[..., RunSpec]
BROKEN = ht.Hadamard(layers=(9,))  # the tiny backbone has three layers


def test_sweep_does_what_is_missing_and_goes_on_after_a_failure(make_spec: MakeSpec, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    sweep([make_spec()], store)
    specs = [make_spec(adapter=BROKEN), make_spec(), make_spec(seed=1), make_spec(seed=1)]
    lines: list[str] = []
    table = sweep(iter(specs), store, report=lines.append)
    assert table["status"].tolist() == ["failed", "present", "done"]
    assert table["key"].tolist() == [spec.key for spec in specs[:3]]
    assert "layers=(9,) is not allowed" in table["reason"][0]
    assert table["score"][1:].between(0, 1).all()
    assert table["score"].isna()[0]
    assert len(store) == 2
    assert store.failed()["key"].tolist() == [specs[0].key]
    assert lines[0].startswith(
        f"[1/2] {specs[0].key} sst2 Hadamard(layers=(9,)) seed 0 failed: ArgumentError"
    )
    assert "left)" in lines[0]
    assert lines[1] == f"[2/2] {specs[2].key} sst2 Hadamard() seed 1 done"


def test_failed_run_is_tried_again(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(adapter=ht.HeadOnly())
    with monkeypatch.context() as patch:
        patch.setenv("HADAMARD_DATA", str(tmp_path / "nowhere"))
        assert sweep([spec], tmp_path)["status"].tolist() == ["failed"]
    assert sweep([spec], tmp_path)["status"].tolist() == ["done"]
    assert sweep([spec], tmp_path)["status"].tolist() == ["present"]
    assert RunStore(tmp_path).failed().empty


def test_run_in_other_hands_is_left_alone(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = RunStore(tmp_path), make_spec()
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("done twice"))
    with store.claim(spec):
        table = sweep([spec], RunStore(tmp_path))
    assert table["status"].tolist() == ["elsewhere"]


def test_run_finished_while_we_waited_is_not_done_again(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = RunStore(tmp_path), make_spec(adapter=ht.HeadOnly())
    assert attempt_run(spec, store).status == "done"
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("done twice"))
    assert attempt_run(spec, store) == Attempt(spec, "done")


def test_interrupt_stops_the_sweep_and_keeps_what_is_done(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = RunStore(tmp_path), module.run

    def interrupted(spec: RunSpec, store: RunStore) -> Any:
        if spec.seed == 1:
            raise KeyboardInterrupt
        return real(spec, store)

    monkeypatch.setattr(module, "run", interrupted)
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in range(3)]
    with pytest.raises(KeyboardInterrupt):
        sweep(specs, store)
    assert store.keys() == [specs[0].key]
    assert store.failed().empty
    with store.claim(specs[1]) as mine:
        assert mine


def kills_its_worker(spec: RunSpec, store: RunStore) -> Attempt:
    """Does runs as usual, except that seed 1 takes its process down, once another run is done."""
    if spec.seed != 1:
        return attempt_run(spec, store)
    while not len(store):
        time.sleep(0.05)
    os._exit(9)


def test_processes_share_the_work_and_survive_a_dead_worker(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "attempt_run", kills_its_worker)
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (1, 0)]
    store = RunStore(tmp_path / "runs")
    table = sweep(specs, store, engine="processes", workers=2)
    assert table["status"].tolist() == ["failed", "done"]
    assert table["reason"][0].startswith("WorkerError: the worker process died")
    assert store.failed()["seed"].tolist() == [1]
    threads = store.run(specs[1].key).info["meta_info"]["device"]["threads"]
    assert threads == max(1, module.usable_cores() // 2)


class FragilePool:
    """A pool in this process that breaks, as a real one does, when seed 1 is run in it."""

    def __init__(self, size: int, devices: int) -> None:
        self.broken = False

    def submit(
        self, function: Any, spec: RunSpec | None = None, store: RunStore | None = None
    ) -> Future[Attempt | None]:
        if self.broken:
            raise BrokenProcessPool
        future: Future[Attempt | None] = Future()
        self.broken = spec is not None and spec.seed == 1
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(Attempt(spec, "done") if spec is not None else None)
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
    specs = [make_spec(seed=seed) for seed in (0, 1, 2, 3, 4)]
    attempts = list(module._processes(specs, RunStore(tmp_path / "runs"), workers))
    assert {attempt.spec.seed: attempt.status for attempt in attempts} == {
        seed: "failed" if seed == 1 else "done" for seed in range(5)
    }
    assert len(attempts) == 5


def sleeps(spec: RunSpec, store: RunStore) -> Attempt:
    """A run of a minute."""
    time.sleep(60)
    return Attempt(spec, "done")


def light_pool(size: int, devices: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"))


def test_interrupt_ends_the_workers_at_once(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pool", light_pool)
    monkeypatch.setattr(module, "attempt_run", sleeps)
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


def test_store_that_cannot_be_written_to_is_one_error_before_the_first_run(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run", lambda *arguments: pytest.fail("trained all the same"))
    store = RunStore(tmp_path / "place" / "runs")
    store.folder.parent.write_text("a file that came in the way")
    for engine in ("inline", "processes"):
        with pytest.raises(StoreError, match=r"place/runs' cannot be written to"):
            sweep([make_spec()], store, engine=engine)
    assert attempt_run(make_spec(), store).reason.startswith("StoreError: store=")


def test_present_runs_are_told_of_a_store_that_is_only_read(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep([make_spec()], tmp_path)
    monkeypatch.setattr(RunStore, "check_writable", lambda store: pytest.fail("nothing is to be written"))
    assert sweep([make_spec()], tmp_path)["status"].tolist() == ["present"]


@pytest.mark.parametrize("damage", ["", "[]", "metric"])
def test_damaged_record_is_named_and_the_other_runs_are_done(
    make_spec: MakeSpec, tmp_path: Path, damage: str
) -> None:
    specs = [make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (0, 1)]
    sweep(specs[:1], tmp_path)
    record = tmp_path / specs[0].key / "run.json"
    good = record.read_text()
    if damage == "metric":
        found = json.loads(good)
        found["metrics"]["test"]["accuracy"] = "high"
        damage = json.dumps(found)
    record.write_text(damage)
    lines: list[str] = []
    table = sweep(specs, tmp_path, report=lines.append)
    assert table["status"].tolist() == ["failed", "done"]
    assert specs[0].key in table["reason"][0]
    assert "DataError: run.json in" in table["reason"][0]
    assert table["reason"][0].endswith("to do the run again")
    assert table["reason"][0] in lines[0]
    assert table["score"].isna().tolist() == [True, False]
    assert record.read_text() == damage  # it may still be mended by hand


def test_run_that_cannot_be_written_is_saved_to_a_place_that_is_named(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec, real = RunStore(tmp_path / "runs"), make_spec(adapter=ht.HeadOnly()), RunStore.add
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(self: RunStore, done: Run) -> Run:
        if self.folder == store.folder:
            raise OSError(28, "No space left on device")
        return real(self, done)

    monkeypatch.setattr(RunStore, "add", full)
    (reason,) = sweep([spec], store)["reason"]
    assert "No space left on device" in reason
    saved = Path(reason.split("; it is saved in ")[1])
    assert RunStore(saved.parent).run(spec.key).score == real(store, run(spec)).score


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


def test_bad_arguments_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="engine='dask' is not allowed"):
        sweep([], tmp_path, engine="dask")
    with pytest.raises(ArgumentError, match="workers=2"):
        sweep([], tmp_path, workers=2)
    with pytest.raises(ArgumentError, match="workers=0"):
        sweep([], tmp_path, engine="processes", workers=0)
    with pytest.raises(ArgumentError, match="must be a RunSpec"):
        sweep(["sst2"], tmp_path)  # type: ignore[list-item]
    assert sweep([], tmp_path).empty


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
        function, (spec, store) = reference
        if spec.seed == 1:
            raise self.RayError("node died")
        return function(spec, store)


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


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (120, "2 min"), (7300, "2 h 2 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
