"""What a training row buys: score against the number of labelled rows, a line per method."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    EDGED,
    check_one_row,
    constant_note,
    draw_constant,
    label_below,
    label_left,
    legend_handles,
    panels_by_task,
    require,
    seeds_text,
)
from hadamard_toolkit.plotting.style import Look, frame, looks, style

SIDE = 1.015  # factor on the axis between neighbouring methods, so that their marks can be told apart


def score_against_rows(table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score") -> Figure:
    """Low-resource curves: score against training rows K on a log axis, one panel per task, one line per method.

    Table: one row per run: `task`, `method` (at most eight), `rows` (K), `seed`, `score`. Optional: `constant`, what
    one answer for all rows scores (`studies.mark_failed` adds it), a dotted line. Drawn: a small mark per run and a
    line through the means over seeds; few seeds are shown as they are, without a deviation. Methods are set a little
    apart, so that they do not cover each other; the ticks stand at K itself.
    """
    table = require(table, "task", "method", "rows", "seed", "score", numbers=("rows", "score"))
    _check(table)
    with style():
        figure, panels, height = panels_by_task(table["task"], venue, height=2.0)
        drawn = looks(table["method"])
        for axis, (task, runs) in zip(panels, table.groupby("task", sort=False, observed=True), strict=True):
            axis.set_xscale("log")
            draw_constant(axis, runs)
            for place, (method, look) in enumerate(drawn.items()):
                shift = SIDE ** (place - (len(drawn) - 1) / 2)
                _line(axis, runs[runs["method"] == method], look, shift)
            sizes = sorted(runs["rows"].unique())
            axis.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
            axis.xaxis.set_major_locator(FixedLocator(sizes))
            axis.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axis.grid(axis="y")
            axis.set_title(str(task))
        label_left(panels, metric)
        label_below(panels, "Training rows (log scale)")
        frame(figure, height, handles=legend_handles(drawn), note=_note(table))
    return figure


def _check(table: pd.DataFrame) -> None:
    if (table["rows"] < 1).any():
        raise ArgumentError(f"table['rows'] holds {table['rows'].min()}; a run has at least one training row")
    check_one_row(table, "task", "method", "rows", "seed")


def _line(axis: Axes, runs: pd.DataFrame, look: Look, shift: float) -> None:
    if runs.empty:
        return
    mean = runs.groupby("rows")["score"].mean()
    line: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, **EDGED}
    axis.plot(mean.index.to_numpy(dtype=float) * shift, mean.to_numpy(), zorder=3, **line)
    dots: dict[str, Any] = {"color": look.colour, "alpha": 0.6, "markersize": 2, "markeredgewidth": 0}
    axis.plot(runs["rows"] * shift, runs["score"], "o", zorder=2, **dots)


def _note(table: pd.DataFrame) -> str:
    count = seeds_text(table, "task", "method", "rows")
    if count == "1 seed":
        return f"Line: one run per method and K, so no spread.{constant_note(table)}"
    return f"Line: mean of {count} per method and K, small dots: the seeds.{constant_note(table)}"
