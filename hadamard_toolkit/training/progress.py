"""Progress bars that behave: a bar in a terminal, a widget in Jupyter, silence in logs and in CI."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import std as plain
from tqdm.auto import tqdm

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)
_watcher: ContextVar[Callable[[str, float], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block, `listener` is called with a line of text per stage and epoch: for logs, where no bar shows."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@contextmanager
def watching(watcher: Callable[[str, float], None]) -> Iterator[None]:
    """Within the block, bars are not drawn: `watcher` gets their description and the share done, 0 to 1, instead."""
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


class _Watched(plain.tqdm):
    """A bar that gives its share to the watcher where others draw it, ten times a second at most."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.total and (watcher := _watcher.get()) is not None:
            watcher(self.desc.removesuffix(": "), self.n / self.total)


def tell(line: str) -> None:
    """Give `line` to whoever listens."""
    if (listener := _listener.get()) is not None:
        listener(line)


def visible() -> bool:
    """Whether bars show: as `HADAMARD_PROGRESS` (0 or 1) says, else not in CI, else in a terminal or Jupyter."""
    chosen = os.environ.get("HADAMARD_PROGRESS", "").strip().lower()
    if chosen:
        return chosen not in ("0", "false", "off", "no")
    if os.environ.get("CI", "").strip().lower() not in ("", "0", "false"):
        return False
    return _in_jupyter() or sys.stderr.isatty()


def _in_jupyter() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    show: bool = True,
) -> Any:
    """A `tqdm` bar over `iterable`, or one to `.update()` by hand; silent where it does not belong or `show=False`."""
    look: dict[str, Any] = {"total": total, "desc": description or None, "unit": unit, "leave": False}
    if show and _watcher.get() is not None:
        return _Watched(iterable, file=io.StringIO(), **look)
    return tqdm(iterable, dynamic_ncols=True, disable=not (show and visible()), **look)
