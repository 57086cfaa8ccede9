"""nbval compares printed text only: tables' HTML repeats it, SVG differs by run, stderr carries progress."""

from __future__ import annotations

import pytest

NOT_COMPARED = ("text/html", "stderr", "image/svg+xml")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Extend nbval's own list on its notebook collectors, which are the only ones that have it."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED
