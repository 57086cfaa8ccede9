"""What a parameter buys: score against the parameters of every method, each named where it stands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    DASHED,
    EDGED,
    check_one_row,
    constant_note,
    counted,
    draw_constant,
    legend_handles,
    require,
)
from hadamard_toolkit.plotting.style import FAINT, INK, Look, frame, looks, new_figure, style
from hadamard_toolkit.studies.statistics import t_interval

HALO = [Stroke(linewidth=1.6, foreground="white"), Normal()]
HEIGHT = 2.7  # inches of the panel
APART = (
    1.2  # factor on the axis between methods with equally many parameters, whose bars would hide each other
)
CROSSED = 120.0  # what it costs a name to touch a mark, a line or another name, in points of distance
# Where a name may stand: direction from its mark and distance in points, the first that is free is taken.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (5.0, 9.0, 14.0, 20.0, 27.0, 36.0)
_SIDES = {-1: "right", 0: "center", 1: "left"}
_HEIGHTS = {-1: "top", 0: "center", 1: "bottom"}


def score_against_parameters(
    table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score"
) -> Figure:
    """Score of every method against its parameters, on a log axis; each named beside its mark.

    Table: `method`, `family` (colour and mark; at most eight), `seed`, `parameters` (trained ones, the head left out),
    `score`; one row per run of one task. Optional: `stored`, the parameters that a file of the adapter holds, which
    then give the place on the axis (a prefix trains through a network that is not stored); and `constant`, what one
    answer for all rows scores (`studies.mark_failed` adds it), a dotted line.

    Drawn: the mean over seeds and ± one standard deviation; a method with one run has a hollow mark and no spread, and
    the note says so. With a column `task` of several tasks, the seeds of a task are averaged first and the bar is the
    95 % t interval over tasks, which speaks of other tasks. A method that trains the head alone has no place on a log
    axis: it is a horizontal line. The grey staircase is the best mean score that so many parameters, or fewer, reached.
    """
    table = require(table, "method", "family", "seed", "parameters", "score", numbers=("parameters", "score"))
    stored = "stored" in table.columns
    if stored:
        table = require(table, numbers=("stored",)).assign(parameters=table["stored"])
    means = _means(table)
    lines, points = means[means["parameters"] == 0], means[means["parameters"] > 0]
    if points.empty:
        raise ArgumentError("table['parameters'] is 0 throughout; there is nothing to put on the axis")
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        drawn = looks(points["family"])
        axis.set_xscale("log")
        axis.set_xlim(points["parameters"].min() / 6, points["parameters"].max() * 3.5)
        for method, row in lines.iterrows():
            axis.axhline(row["score"], color=INK, linewidth=0.8, linestyle=DASHED, zorder=1)
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            look: dict[str, Any] = {"ha": "right", "va": "bottom", "color": INK, "path_effects": HALO}
            axis.annotate(str(method), (1, row["score"]), (-2, 2), fontsize=6, **place, **look)
        draw_constant(axis, table)
        stairs = _staircase(axis, means)
        bars = [_mark(axis, row, drawn[row["family"]]) for _, row in points.iterrows()]
        axis.set_xlabel(f"{'Stored' if stored else 'Trained'} parameters, head left out (log scale)")
        axis.set_ylabel(metric)
        axis.grid(axis="y")
        axis.margins(y=0.1)
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_locator(LogLocator(numticks=12))
        axis.xaxis.set_minor_locator(NullLocator())
        frame(
            figure, HEIGHT, handles=legend_handles(drawn, line=""), note=_note(means) + constant_note(table)
        )
        levels = [np.array([(x, y) for x in axis.get_xlim()]) for y in lines["score"]]
        _name_points(figure, axis, points, [stairs, *levels, *(bar for bar in bars if bar is not None)])
    return figure


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Per method, in the order of the table: family, parameters, score, low and high of its bar, seeds, tasks."""
    several = "task" in table.columns and table["task"].nunique() > 1
    unit = ["method", "task"] if several else ["method"]
    check_one_row(table, *unit, "seed", hint=f"one row per {' and '.join([*unit, 'seed'])} is drawn")
    grouped = table.groupby("method", sort=False, observed=True)
    for column in ("parameters", "family"):
        if (counts := grouped[column].nunique() > 1).any():
            raise ArgumentError(f"table[{column!r}] differs between the rows of {counts.idxmax()!r}")
    if (table["parameters"] < 0).any():
        raise ArgumentError(f"table['parameters'] holds {table['parameters'].min()}; counts are needed")
    means = grouped.agg(
        family=("family", "first"),
        parameters=("parameters", "first"),
        score=("score", "mean"),
        deviation=("score", "std"),
        seeds=("seed", "nunique"),
    ).assign(tasks=1)
    means["low"], means["high"] = means["score"] - means["deviation"], means["score"] + means["deviation"]
    if several:
        by_task = table.groupby(unit, sort=False, observed=True)["score"].mean()
        for method, scores in by_task.groupby("method", sort=False, observed=True):
            interval = t_interval(scores.to_numpy(dtype=float))
            means.loc[method, ["score", "low", "high", "tasks"]] = [*interval, len(scores)]
        same = means.groupby("parameters")["score"]
        means["parameters"] *= APART ** (same.rank(method="first") - (same.transform("size") + 1) / 2)
    return means


def _staircase(axis: Axes, means: pd.DataFrame) -> np.ndarray:
    """Draw it; its corners [n, 2]."""
    best = means.sort_values("parameters")[["parameters", "score"]].astype(float)
    low, high = axis.get_xlim()
    across = np.array([*best["parameters"].clip(lower=low), high])
    reached = best["score"].cummax().to_numpy()
    up = np.append(reached, reached[-1])
    corners = np.column_stack([np.repeat(across, 2)[1:], np.repeat(up, 2)[:-1]])
    axis.plot(*corners.T, color=FAINT, alpha=0.5, linewidth=0.9, zorder=1.5)
    return corners


def _mark(axis: Axes, row: pd.Series, look: Look) -> np.ndarray | None:
    """Draw the mean of a method, hollow if it has no spread; the ends [2, 2] of its bar, if there is one."""
    at, score = row["parameters"], row["score"]
    shape: dict[str, Any] = {"color": look.colour, "markersize": 5, "zorder": 4}
    spread = np.isfinite(row["low"])
    shape |= EDGED if spread else {"markerfacecolor": "white", "markeredgewidth": 1.0}
    axis.plot(at, score, look.marker, **shape)
    if not spread:
        return None
    ends = row["low"], row["high"]
    axis.vlines(at, *ends, color=look.colour, linewidth=1.1, zorder=3)
    return np.array([(at, end) for end in ends])


def _name_points(figure: Figure, axis: Axes, points: pd.DataFrame, lines: Sequence[np.ndarray]) -> None:
    """Put every name where it hides no mark and no other name, as near to its own mark as can be. Lines are [n, 2]."""
    figure.draw_without_rendering()  # the layout decides where the marks lie
    reach = 3 * figure.dpi / 72
    at = axis.transData.transform(points[["parameters", "score"]].to_numpy(dtype=float))
    marks = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in at]
    ends = [end for line in lines for end in itertools.pairwise(axis.transData.transform(line))]
    taken = [*marks, *(text.get_window_extent() for text in axis.texts)]
    taken += [Bbox([np.minimum(a, b), np.maximum(a, b)]).padded(0.5) for a, b in ends]
    # the crowded ones first: they have the least choice
    crowded = [float(np.sort(np.hypot(*(at - here).T))[1:4].sum()) for here in at]
    for place in np.argsort(crowded, kind="stable"):
        row = points.iloc[place]
        others = [mark for mark in marks if np.hypot(*(mark.min - marks[place].min)) > reach]
        name = _Name(axis, str(points.index[place]), (row["parameters"], row["score"]), marks[place], others)
        taken.append(name.put(taken))


@dataclass(frozen=True)
class _Name:
    """The name of one mark, on its way to its place. Boxes are in pixels."""

    axis: Axes
    name: str
    at: tuple[float, float]
    mark: Bbox
    others: Sequence[Bbox]

    def put(self, taken: Sequence[Bbox]) -> Bbox:
        """Write it at the cheapest place and say where; the first that costs nothing ends the search."""
        tried: list[tuple[float, float, tuple[int, int], Bbox]] = []
        for distance, direction in itertools.product(_DISTANCES, _DIRECTIONS):
            text = self._write(distance, direction)
            box = text.get_window_extent()
            text.remove()
            hidden = self._hides(box.padded(0.5), taken)
            tried.append((hidden + distance, distance, direction, box))
            if hidden == 0:
                break
        _, distance, direction, box = min(tried, key=lambda one: one[0])
        self._write(distance, direction, leader=distance > _DISTANCES[0])
        return box

    def _write(self, distance: float, direction: tuple[int, int], *, leader: bool = False) -> Annotation:
        across, up = direction
        far = distance * (0.75 if across and up else 1.0)
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2.5}
        look: dict[str, Any] = {"fontsize": 6, "color": INK, "zorder": 5, "path_effects": HALO}
        look["parse_math"] = False  # a name may hold a "$"
        look |= {"ha": _SIDES[across], "va": _HEIGHTS[up], "arrowprops": line if leader else None}
        return self.axis.annotate(
            self.name, self.at, (across * far, up * far), textcoords="offset points", **look
        )

    def _hides(self, box: Bbox, taken: Sequence[Bbox]) -> float:
        """How bad it would be there: what it touches or covers, what sticks out, and whose name it seems to be."""
        covered = [_area(common) for other in taken if (common := Bbox.intersection(box, other)) is not None]
        hidden = sum(CROSSED + 4 * area for area in covered)
        outside = _area(box) - _area(Bbox.intersection(box, self.axis.bbox))
        mistaken = any(_gap(box, other) < _gap(box, self.mark) + 2 for other in self.others)
        return hidden + 3 * max(outside, 0.0) + 2 * CROSSED * mistaken


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def _gap(one: Bbox, other: Bbox) -> float:
    """The distance between two boxes; 0 where they touch."""
    across = max(one.x0 - other.x1, other.x0 - one.x1, 0.0)
    return float(np.hypot(across, max(one.y0 - other.y1, other.y0 - one.y1, 0.0)))


def _note(means: pd.DataFrame) -> str:
    if means["tasks"].max() > 1:
        spread = (
            f"Mark: mean of {counted(means['tasks'], 'task')} with {counted(means['seeds'], 'seed')} each"
        )
        spread += ", bar: 95 % t interval over tasks; methods of one size stand a little apart"
    elif means["seeds"].max() == 1:
        spread = "One run per method, n\u00a0=\u00a01, so no spread: another seed may change the order"
    else:
        spread = f"Mark: mean, bar: ± one standard deviation of {counted(means['seeds'], 'seed')}"
        spread += "; hollow: one run, no spread" if means["seeds"].min() == 1 else ""
    lines = " Dashed: nothing trained but the head." if (means["parameters"] == 0).any() else ""
    return f"{spread}.{lines} Grey: the best mean score that so many parameters, or fewer, reached."
