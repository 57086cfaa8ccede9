"""Work that takes seconds, done in steps, so that a widget stays alive meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from hadamard_toolkit.errors import ArgumentError

Steps = Iterator[tuple[str, float]]
"""Work that yields before each step: a description, and the share of the whole that is done."""

PAUSE = 0.001  # seconds between steps of idle work: a message takes several rounds of the loop to arrive
LONG_PAUSE = 0.01  # the same of work that shows its progress


class Background:
    """Runs work step by step on the kernel's loop: one long piece at a time, or work that fills idle time.

    For long work, `progress(text, share)` is called before each step and `progress("", None)` at the end, and
    `cancelled()` if `stop` ended it. `failed` gets an error of either kind of work.
    """

    def __init__(
        self,
        progress: Callable[[str, float | None], object],
        failed: Callable[[Exception], object],
        cancelled: Callable[[], object],
    ) -> None:
        self._progress, self._failed, self._cancelled = progress, failed, cancelled
        self._long: asyncio.Task[None] | None = None
        self._idle: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self, steps: Steps, then: Callable[[], object], pause: float = LONG_PAUSE) -> None:
        """Do the `steps`, `pause` seconds apart, then call `then`; idle work is dropped.

        Where no loop runs, the work is done before this returns. Raises `ArgumentError` during other long work.
        """
        if self._long is not None and not self._long.done():
            raise ArgumentError("something is going on already; cancel it first")
        self.stop_idle()
        self._stopped = False
        work = self._go(steps, then, pause)
        if (task := _as_task(work)) is None:
            asyncio.run(work)
        self._long = task

    def stop(self) -> None:
        """End long work before its next step."""
        self._stopped = True

    def fill(self, steps: Iterator[object]) -> None:
        """Do `steps` in place of the idle work before, a step at a time when the loop has nothing else to do.

        Where no loop runs, nothing is done: nobody is there to be quicker than.
        """
        self.stop_idle()
        work = self._fill(steps)
        self._idle = _as_task(work)
        if self._idle is None:
            work.close()

    def stop_idle(self) -> None:
        """Drop what is left of the idle work."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    async def _go(self, steps: Steps, then: Callable[[], object], pause: float) -> None:
        try:
            for text, share in steps:
                if self._stopped:
                    break
                self._progress(text, share)
                await asyncio.sleep(pause)
        except Exception as error:
            self._failed(error)
            return
        finally:
            self._progress("", None)
        if self._stopped:
            self._cancelled()
        else:
            then()

    async def _fill(self, steps: Iterator[object]) -> None:
        await asyncio.sleep(PAUSE)
        try:
            for _ in steps:
                await asyncio.sleep(PAUSE)
        except Exception as error:
            self._failed(error)


def _as_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """`work` on the loop that runs, or None where none does."""
    try:
        return asyncio.get_running_loop().create_task(work)
    except RuntimeError:
        return None
