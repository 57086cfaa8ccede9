"""What several figures share: the check of a table, a grid of panels, legend entries, counts in words."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.export import rounded
from hadamard_toolkit.plotting.style import GRID, Look, new_figure

EDGED: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5}
VECTOR_TITLES = {"weight": "Weight, learned W − 1", "bias": "Bias, learned b"}


def require(table: pd.DataFrame, *columns: str, numbers: Sequence[str] = ()) -> pd.DataFrame:
    """The table as it is drawn (`rounded`); `ArgumentError` unless it has rows, the `columns` and finite `numbers`."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ArgumentError(
            f"table has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, table.columns))}"
        )
    if table.empty:
        raise ArgumentError("table has no rows; there is nothing to draw")
    for column in numbers:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise ArgumentError(f"table[{column!r}] is of type {table[column].dtype}; numbers are needed")
        if not np.isfinite(table[column].to_numpy(dtype=float)).all():
            raise ArgumentError(
                f"table[{column!r}] holds missing or infinite values; drop or explain them first"
            )
    return rounded(table)


def panels_by_task(
    tasks: pd.Series, venue: str | None, *, height: float, labels: Sequence[object] | None = None
) -> tuple[Figure, list[Axes], float]:
    """A grid of panels, one per task, and its height: as many in a row as can be read beside the row `labels`."""
    count = tasks.nunique()
    figure = new_figure(venue)
    beside = 0.1 + 0.05 * max(len(str(label)) for label in labels) if labels else 0.0
    room = max(1, int((figure.get_figwidth() - beside) / 1.25))
    rows = math.ceil(count / room)
    columns = math.ceil(count / rows)
    panels = list(figure.subplots(rows, columns, sharey=labels is not None, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count], rows * height + 0.15


def stripes(axis: Axes, count: int) -> None:
    for column in range(0, count, 2):
        axis.axvspan(column - 0.5, column + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)


def label_below(panels: Sequence[Axes], text: str) -> None:
    """Name the horizontal axis under the lowest panel of each column."""
    lowest = {panel.get_subplotspec().colspan.start: panel for panel in panels}  # type: ignore[union-attr]
    for panel in lowest.values():
        panel.set_xlabel(text)


def legend_handles(drawn: Mapping[Hashable, Look], *, wide: bool = False) -> list[Line2D]:
    size: dict[str, Any] = {"linewidth": 2.6, "markersize": 4.2} if wide else {}
    return [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle="-" if wide else look.line,
            label=str(name),
            **EDGED,
            **size,
        )
        for name, look in drawn.items()
    ]


def seeds_text(table: pd.DataFrame, *by: str) -> str:
    """`"3 seeds"`, or `"2 to 3 seeds"` where the groups of `by` have different numbers."""
    counts = table.groupby(list(by), observed=True)["seed"].nunique()
    least, most = int(counts.min()), int(counts.max())
    return plural(least, "seed") if least == most else f"{least} to {most} seeds"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def readable(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
