"""Progress bars that behave: a bar in a terminal, a widget in Jupyter, silence in logs and in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block, `listener` is called with a line of text per stage and epoch: for logs, where no bar shows."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


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
    return tqdm(
        iterable,
        total=total,
        desc=description or None,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=not (show and visible()),
    )
