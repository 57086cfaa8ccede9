"""Which banks of a sweep are still started when its time is limited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from hadamard_toolkit.runs.bank import Bank
from hadamard_toolkit.runs.labels import method_name
from hadamard_toolkit.runs.spec import RunSpec

Clock = Callable[[], float]


class Schedule:
    """The banks of a sweep, each given out when a worker is free for it and if it will end within `minutes`.

    Whether it will is said by the banks that have ended: those with the same backbone, method and tasks, else with the
    same backbone and method, else all. A bank is expected to take their mean time, and longer in proportion where it
    has more runs than they had. Before any has ended nothing is known, and a bank is started if there is time at all.
    """

    def __init__(self, banks: Sequence[Bank], minutes: float | None, clock: Clock) -> None:
        self._banks, self._clock = banks, clock
        self._end = math.inf if minutes is None else clock() + 60 * minutes
        self._started: dict[RunSpec, tuple[Bank, float]] = {}
        self._ended: list[tuple[Bank, float]] = []

    def __len__(self) -> int:
        return len(self._banks)

    def __iter__(self) -> Iterator[Bank]:
        for bank in self._banks:
            if self._expected(bank) < self.remaining():
                self._started |= dict.fromkeys(bank.specs, (bank, self._clock()))
                yield bank

    def remaining(self) -> float:
        """Seconds until the limit."""
        return self._end - self._clock()

    def note(self, spec: RunSpec) -> None:
        """Learn from a run that is done, and with it its bank, how long such a bank takes."""
        if spec in self._started:
            bank, start = self._started[spec]
            self._ended.append((bank, self._clock() - start))
            for member in bank.specs:
                self._started.pop(member)

    def _expected(self, bank: Bank) -> float:
        kind = _kind(bank)
        for shared in (3, 2, 0):
            if like := [
                seconds * max(1, len(bank.specs) / len(past.specs))
                for past, seconds in self._ended
                if _kind(past)[:shared] == kind[:shared]
            ]:
                return fmean(like)
        return 0.0


def _kind(bank: Bank) -> tuple[str, str, set[str]]:
    first = bank.specs[0]
    return first.backbone, method_name(first.adapter), {spec.task for spec in bank.specs}
