from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs import bank, engines
from hadamard_toolkit.runs.bank import Bank, banks
from hadamard_toolkit.runs.engines import Attempt
from hadamard_toolkit.runs.schedule import Schedule
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep
from tests.runs.conftest import PROTOCOL
from tests.runs.test_engines import FakeRay, FragilePool

MakeSpec = Callable[..., RunSpec]


class Clock:
    """Seconds that pass only where a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every attempt at a bank takes a minute per run with LoRA, else half a minute, and nothing is trained."""
    found = Clock()

    def attempt(bank: Bank, store: RunStore) -> list[Attempt]:
        for spec in bank.specs:
            found.now += 60 if isinstance(spec.adapter, ht.LoRA) else 30
        return [Attempt(spec, "failed" if spec.seed == 99 else "done") for spec in bank.specs]

    monkeypatch.setattr(engines, "attempt", attempt)
    return found


def statuses(specs: list[RunSpec], clock: Clock, folder: Path, **options: Any) -> list[str]:
    return sweep(specs, folder, clock=clock, **options)["status"].tolist()


@pytest.mark.parametrize(("minutes", "done"), [(0.4, 1), (1.5, 2), (1.6, 3), (100, 4), (None, 4)])
def test_no_run_is_started_that_would_not_end_in_time(
    make_spec: MakeSpec, tmp_path: Path, clock: Clock, minutes: float | None, done: int
) -> None:
    specs = [make_spec(seed=seed) for seed in range(4)]
    assert statuses(specs, clock, tmp_path, minutes=minutes) == ["done"] * done + ["left"] * (4 - done)


def test_runs_of_another_method_are_measured_apart_and_a_short_one_fills_the_time(
    make_spec: MakeSpec, tmp_path: Path, clock: Clock
) -> None:
    long, short = ht.LoRA(), ht.Hadamard()
    specs = [make_spec(seed=seed, adapter=adapter) for seed in (0, 1) for adapter in (long, short)]
    assert statuses(specs, clock, tmp_path, minutes=2.2) == ["done", "done", "left", "done"]


def test_banks_are_started_while_there_is_time_and_hold_the_first_runs_first(
    make_spec: MakeSpec, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "_about", lambda task: ("classification", 2, "classification"))
    specs = [make_spec(seed=seed, task=task) for seed in range(4) for task in ("sst2", "mrpc")]
    assert statuses(specs, clock, tmp_path, minutes=3.1, bank=3) == ["done"] * 6 + ["left"] * 2
    assert [len(bank.specs) for bank in banks(specs, 3)] == [3, 3, 2]
    assert {spec.task for spec in banks(specs, 3)[0].specs} == {"mrpc"}
    other = make_spec(adapter=ht.HeadOnly())
    ordered = [*specs[:4], other, *specs[4:]]
    assert [len(bank.specs) for bank in banks(ordered, 4, in_order=True)] == [4, 1, 4]
    assert banks([*specs[:3], other, *specs[3:]], 4, in_order=True)[1].specs == (other,)


LORA, HADAMARD, HEAD = ht.LoRA(), ht.Hadamard(), ht.HeadOnly()
PAST = [(LORA, "sst2", 1, 60), (LORA, "sst2", 1, 120), (LORA, "rte", 2, 30), (HADAMARD, "sst2", 1, 10)]


@pytest.mark.parametrize(
    ("adapter", "task", "runs", "seconds"),
    [
        (LORA, "sst2", 1, 90),  # with the same task
        (LORA, "rte", 1, 30),  # a single run may take as long as two
        (LORA, "rte", 6, 90),  # three times the runs
        (LORA, "mrpc", 1, 70),  # with the same method
        (LORA, "mrpc", 2, (120 + 240 + 30) / 3),
        (HADAMARD, "mrpc", 1, 10),
        (HEAD, "sst2", 1, 55),  # all
    ],
)
def test_a_bank_is_expected_to_take_the_time_of_those_most_like_it(
    make_spec: MakeSpec, adapter: Adapter, task: str, runs: int, seconds: float
) -> None:
    def of(adapter: Adapter, task: str, runs: int, first: int) -> Bank:
        return Bank(tuple(make_spec(adapter=adapter, task=task, seed=first + run) for run in range(runs)))

    past = [of(adapter, task, runs, 10 * place) for place, (adapter, task, runs, _) in enumerate(PAST)]
    for left, started in ((seconds - 0.1, False), (seconds + 0.1, True)):
        clock, bank = Clock(), of(adapter, task, runs, 100)
        schedule = Schedule([*past, bank], 60, clock)
        upcoming = iter(schedule)
        for known, (*_, took) in zip(past, PAST, strict=True):
            assert next(upcoming) is known
            clock.now += took
            for spec in known.specs:  # the first says all of its bank
                schedule.note(spec)
        clock.now = 1000 + 3600 - left
        assert (next(upcoming, None) is bank) == started
    assert list(Schedule(past, 1, Clock())) == past, "without a measurement, everything is started"


def test_what_failed_says_nothing_of_how_long_a_run_takes(
    make_spec: MakeSpec, tmp_path: Path, clock: Clock
) -> None:
    specs = [make_spec(seed=seed, adapter=ht.LoRA()) for seed in (99, 0, 1)]
    assert statuses(specs, clock, tmp_path, minutes=1.1) == ["failed", "done", "left"]


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_other_engines_start_no_more_than_they_have_workers(
    make_spec: MakeSpec, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    class Pool(FragilePool):
        def submit(self, function: Any, *arguments: Any) -> Any:
            clock.now += 60
            return super().submit(function, *arguments)

    monkeypatch.setattr(engines, "_pool", Pool)
    monkeypatch.setitem(__import__("sys").modules, "ray", FakeRay(gpus=0, cpus=4))
    specs = [make_spec(seed=seed) for seed in (0, 2, 3, 4, 5)]
    found = statuses(specs, clock, tmp_path, engine=engine, workers=2, minutes=2.2)
    assert found[0] == "done"
    assert found[-1] == "left"
    assert set(found) == {"done", "left"}


def test_what_was_left_is_done_by_the_same_call(make_spec: MakeSpec, tmp_path: Path) -> None:
    specs = [make_spec(seed=seed, adapter=ht.HeadOnly()) for seed in (0, 1)]
    store = RunStore(tmp_path)
    table = sweep(specs, store, minutes=2.1, clock=lambda: 100.0 * len(store))
    assert table["status"].tolist() == ["done", "left"]
    assert table["reason"].tolist() == ["", "it would not end within 2.1 minutes"]
    assert sweep(specs, tmp_path, minutes=60)["status"].tolist() == ["present", "done"]


def test_the_report_says_how_many_runs_a_minute(make_spec: MakeSpec, tmp_path: Path, clock: Clock) -> None:
    lines: list[str] = []
    specs = [make_spec(seed=seed, protocol=replace(PROTOCOL, epochs=2)) for seed in range(3)]
    statuses(specs, clock, tmp_path, minutes=1.1, report=lines.append)
    assert [re.sub(".* done", "", line) for line in lines] == [
        " (2.00 runs per minute, about 36 s left)",
        " (2.00 runs per minute, about 6 s left)",
    ]


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "8", True])
def test_bad_limits_are_refused(make_spec: MakeSpec, tmp_path: Path, minutes: Any) -> None:
    with pytest.raises(ArgumentError, match="minutes="):
        sweep([make_spec()], tmp_path, minutes=minutes)
