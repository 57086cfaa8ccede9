"""What a parameter buys: score against trained parameters, every method named where it stands."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.plots import require
from hadamard_toolkit.plotting.style import FAINT, INK, Look, frame, looks, new_figure, style

EDGED: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5}
HEIGHT = 2.7  # inches of the panel
# Where a name may stand: direction from its mark and distance in points, the first that is free is taken.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (5.0, 9.0, 14.0, 20.0, 27.0)
_SIDES = {-1: "right", 0: "center", 1: "left"}
_HEIGHTS = {-1: "top", 0: "center", 1: "bottom"}


def score_against_parameters(table: pd.DataFrame, *, venue: str = "neurips", metric: str = "Score") -> Figure:
    """Score of every method against the parameters it trains, on a log axis; each named beside its mark.

    Table: `method`, `family` (colour and mark; at most eight), `seed`, `parameters` (trained ones, the head left out),
    `score`; one row per run of one task. Drawn: the mean over seeds and ± one standard deviation (with one seed no
    spread, and the note says so). A method that trains the head alone has no place on a log axis: it is a
    horizontal line. The grey staircase is the best mean score that so many parameters, or fewer, reached.
    """
    require(table, "method", "family", "seed", "parameters", "score", numbers=("parameters", "score"))
    means = _means(table)
    lines, points = means[means["parameters"] == 0], means[means["parameters"] > 0]
    if points.empty:
        raise ArgumentError("table['parameters'] is 0 throughout; there is nothing to put on the axis")
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        drawn = looks(means["family"])
        axis.set_xscale("log")
        axis.set_xlim(points["parameters"].min() / 2.2, points["parameters"].max() * 3.5)
        for method, row in lines.iterrows():
            axis.axhline(
                row["score"],
                color=drawn[row["family"]].colour,
                linewidth=0.9,
                linestyle=(0, (4, 2)),
                zorder=1,
            )
            axis.annotate(
                str(method),
                (1, row["score"]),
                (-2, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6,
                color=INK,
            )
        _staircase(axis, means)
        for _, row in points.iterrows():
            _mark(axis, row, drawn[row["family"]])
        axis.set_xlabel("Trained parameters, head left out (log scale)")
        axis.set_ylabel(metric)
        axis.grid(axis="y")
        axis.margins(y=0.1)
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_locator(LogLocator(numticks=12))
        axis.xaxis.set_minor_locator(NullLocator())
        note = _note(means)
        frame(figure, HEIGHT, handles=_handles(drawn), note=note)
        _name_points(figure, axis, points)
    return figure


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Per method, in the order of the table: family, parameters, score, deviation, seeds."""
    if table.duplicated(["method", "seed"]).any():
        first = table.loc[table.duplicated(["method", "seed"]), ["method", "seed"]].iloc[0].to_dict()
        raise ArgumentError(f"table has more than one row for {first}; one row per method and seed is drawn")
    grouped = table.groupby("method", sort=False, observed=True)
    for column in ("parameters", "family"):
        if (counts := grouped[column].nunique() > 1).any():
            raise ArgumentError(f"table[{column!r}] differs between the rows of {counts.idxmax()!r}")
    if (table["parameters"] < 0).any():
        raise ArgumentError(f"table['parameters'] holds {table['parameters'].min()}; counts are needed")
    return grouped.agg(
        family=("family", "first"),
        parameters=("parameters", "first"),
        score=("score", "mean"),
        deviation=("score", "std"),
        seeds=("seed", "nunique"),
    )


def _staircase(axis: Axes, means: pd.DataFrame) -> None:
    best = means.sort_values("parameters")[["parameters", "score"]].astype(float)
    low, high = axis.get_xlim()
    steps = [max(low, count) for count in best["parameters"]]
    reached = best["score"].cummax().tolist()
    axis.step(
        [*steps, high],
        [*reached, reached[-1]],
        where="post",
        color=FAINT,
        alpha=0.55,
        linewidth=0.9,
        zorder=1.5,
    )


def _mark(axis: Axes, row: Any, look: Look) -> None:
    if row["seeds"] > 1:
        low, high = row["score"] - row["deviation"], row["score"] + row["deviation"]
        axis.vlines(row["parameters"], low, high, color=look.colour, linewidth=1.1, zorder=3)
    axis.plot(
        row["parameters"], row["score"], look.marker, color=look.colour, markersize=5, zorder=4, **EDGED
    )


def _name_points(figure: Figure, axis: Axes, points: pd.DataFrame) -> None:
    """Put every name where it hides neither a mark nor another name, as near to its own mark as can be."""
    figure.draw_without_rendering()  # the layout decides where the marks lie
    scale = figure.dpi / 72
    at = axis.transData.transform(points[["parameters", "score"]].to_numpy(dtype=float))
    taken = [Bbox.from_extents(x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale) for x, y in at]
    taken += [text.get_window_extent() for text in axis.texts]
    # the crowded ones first: they have the least choice
    nearest = [np.sort(np.hypot(*(at - here).T))[1:3].sum() for here in at]
    for place in np.argsort(nearest, kind="stable"):
        row = points.iloc[place]
        text = _place_name(axis, str(points.index[place]), (row["parameters"], row["score"]), taken)
        taken.append(text.get_window_extent())


def _place_name(axis: Axes, name: str, at: tuple[float, float], taken: Sequence[Bbox]) -> Annotation:
    best: tuple[float, Annotation] | None = None
    for distance in _DISTANCES:
        for across, up in _DIRECTIONS:
            far = distance * (0.75 if across and up else 1.0)
            text = axis.annotate(
                name,
                at,
                (across * far, up * far),
                textcoords="offset points",
                fontsize=6,
                color=INK,
                zorder=5,
                ha=_SIDES[across],
                va=_HEIGHTS[up],
                arrowprops={
                    "arrowstyle": "-",
                    "color": FAINT,
                    "linewidth": 0.5,
                    "shrinkA": 0.5,
                    "shrinkB": 2.5,
                }
                if distance > _DISTANCES[1]
                else None,
            )
            cost = _cost(text, axis, taken)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, text
            else:
                text.remove()
            if cost == 0:
                return text
    assert best is not None
    return best[1]


def _cost(text: Annotation, axis: Axes, taken: Sequence[Bbox]) -> float:
    """Area in square pixels by which the words cover what is there or leave the panel."""
    box = text.get_window_extent().padded(0.5)
    hidden = sum(float(np.prod(both.size)) for other in taken if (both := Bbox.intersection(box, other)))
    inside = Bbox.intersection(box, axis.bbox)
    outside = float(np.prod(box.size)) - (float(np.prod(inside.size)) if inside else 0.0)
    return hidden + max(outside, 0.0) * 3


def _handles(drawn: Mapping[Hashable, Look]) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle="",
            markersize=4.6,
            label=str(name),
            **EDGED,
        )
        for name, look in drawn.items()
    ]


def _note(means: pd.DataFrame) -> str:
    least, most = int(means["seeds"].min()), int(means["seeds"].max())
    count = f"{least}" if least == most else f"{least} to {most}"
    spread = (
        f"Mark: mean, bar: ± one standard deviation of {count} seeds"
        if most > 1
        else "One run per method, so no spread"
    )
    lines = " Dashed: nothing trained but the head." if (means["parameters"] == 0).any() else ""
    return f"{spread}.{lines} Grey: the best mean score that so many parameters, or fewer, reached."
