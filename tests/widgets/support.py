"""What several tests of the pruner read from it or wait for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from hadamard_toolkit.widgets.pruner import LayerPruner


def shown(pruner: LayerPruner) -> list[list[str]]:
    """The cells of the table of scores."""
    rows = re.findall(r"<tr.*?</tr>", pruner.panel._numbers.value)[1:]
    return [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]


async def until(holds: Callable[[], bool]) -> None:
    """Give the loop time until something holds."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never held")
