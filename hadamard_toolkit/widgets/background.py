"""Work that takes seconds, done in steps, so that a widget stays alive meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from hadamard_toolkit.errors import ArgumentError

Steps = Iterator[tuple[str, float]]
"""What is done before each step comes: what it is, and the share of the whole that is behind it."""


PAUSE = 0.001  # seconds between steps: a message takes several rounds of the loop to arrive


class Background:
    """One piece of work at a time, on the kernel's loop; where no loop runs, it is done before `start` returns.

    `progress(text, share)` is called before each step, and `progress("", None)` at the end; `failed` gets an error of
    the work, `cancelled` is called when `stop` ended it.
    """

    def __init__(
        self,
        progress: Callable[[str, float | None], object],
        failed: Callable[[Exception], object],
        cancelled: Callable[[], object],
    ) -> None:
        self._progress, self._failed, self._cancelled = progress, failed, cancelled
        self._task: asyncio.Task[None] | None = None
        self._stop = False

    def start(self, steps: Steps, then: Callable[[], object], pause: float = 0.0) -> None:
        """Go through `steps`, `pause` seconds between them, then call `then`. Raises where work is going on."""
        if self._task is not None and not self._task.done():
            raise ArgumentError("something is going on already; cancel it first")
        self._stop = False
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._go(steps, then, pause))
        else:
            self._task = asyncio.ensure_future(self._go(steps, then, pause))

    def stop(self) -> None:
        """End the work before its next step."""
        self._stop = True

    async def _go(self, steps: Steps, then: Callable[[], object], pause: float) -> None:
        try:
            for text, share in steps:
                if self._stop:
                    break
                self._progress(text, share)
                await asyncio.sleep(max(pause, 0.01))
        except Exception as error:
            self._failed(error)
            return
        finally:
            self._progress("", None)
        if self._stop:
            self._cancelled()
        else:
            then()


class Idle:
    """Work that gives way to events: a step at a time when the kernel's loop has nothing else to do.

    New work takes the place of the old. Where no loop runs nothing is done: nobody is there to be quicker than.
    `failed` gets an error of the work.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._next: asyncio.TimerHandle | None = None

    def start(self, steps: Iterator[object]) -> None:
        """Go through `steps`; what else waits on the loop comes between them."""
        self.stop()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._next = loop.call_later(PAUSE, self._step, steps)

    def stop(self) -> None:
        """Drop what is left of the work."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _step(self, steps: Iterator[object]) -> None:
        try:
            next(steps)
        except StopIteration:
            return
        except Exception as error:
            self._failed(error)
            return
        self.start(steps)
