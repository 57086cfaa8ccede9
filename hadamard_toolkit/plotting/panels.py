"""What several figures share: the check of a table, a grid of panels, legend entries, counts in words."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.export import rounded
from hadamard_toolkit.plotting.style import GRID, INK, Look, new_figure
from hadamard_toolkit.studies.frames import require_columns

EDGED: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5}
DOTTED = (0, (1, 1.5))
DASHED = (0, (4, 2))
VECTOR_TITLES = {"weight": "Weight, learned W − 1", "bias": "Bias, learned b"}


def require(table: pd.DataFrame, *columns: str, numbers: Sequence[str] = ()) -> pd.DataFrame:
    """The table as it is drawn (`rounded`); `ArgumentError` unless it has rows, the `columns` and finite `numbers`."""
    require_columns("table", table, *columns)
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


def check_one_row(table: pd.DataFrame, *columns: str, hint: str = "one row per run is drawn") -> None:
    """Raise `ArgumentError` unless no two rows have the same values in `columns`; `hint` says what to do."""
    repeated = table.duplicated([*columns])
    if repeated.any():
        first = table.loc[repeated, [*columns]].iloc[0].to_dict()
        raise ArgumentError(f"table has more than one row for {first}; {hint}")


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


def label_left(panels: Sequence[Axes], text: str) -> None:
    """Name the vertical axis at the first panel of each row."""
    for panel in panels:
        if panel.get_subplotspec().colspan.start == 0:  # type: ignore[union-attr]
            panel.set_ylabel(text)


def legend_handles(drawn: Mapping[Hashable, Look], *, line: Any = None, wide: bool = False) -> list[Line2D]:
    """An entry per class: its colour, mark and line, or the style `line` for all of them (`""`: marks alone)."""
    size: dict[str, Any] = {"linewidth": 2.6, "markersize": 4.2} if wide else {}
    size |= {"markersize": 4.6} if line == "" else {}
    return [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line if line is None else line,
            label=str(name),
            **EDGED,
            **size,
        )
        for name, look in drawn.items()
    ]


def draw_constant(axis: Axes, rows: pd.DataFrame, *, vertical: bool = False) -> None:
    """Mark what one answer for all rows scores, if the table has it: the mean of the optional column `constant`."""
    if "constant" in rows.columns and rows["constant"].notna().any():
        line = axis.axvline if vertical else axis.axhline
        line(rows["constant"].mean(), color=INK, linewidth=0.8, linestyle=DOTTED, zorder=1)


def constant_note(table: pd.DataFrame) -> str:
    known = "constant" in table.columns and table["constant"].notna().any()
    return " Dotted: one answer for all rows." if known else ""


def counted(numbers: Iterable[float], noun: str = "") -> str:
    """`"3 seeds"`, or `"2 to 3 seeds"` where the numbers differ; without a noun the numbers alone."""
    known = [int(number) for number in numbers]
    least, most = min(known), max(known)
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} {noun}{'s' * (most != 1)}" if noun else count


def seeds_text(table: pd.DataFrame, *by: str) -> str:
    """How many seeds the groups of `by` have, as `counted` says it."""
    return counted(table.groupby(list(by), observed=True)["seed"].nunique(), "seed")


def plural(count: int, noun: str) -> str:
    return counted([count], noun)


def readable(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
