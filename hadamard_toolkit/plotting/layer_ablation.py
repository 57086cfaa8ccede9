"""Figures of layer pruning: how far layers moved, what is left without them, which ones tasks agree to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    DASHED,
    EDGED,
    VECTOR_TITLES,
    constant_note,
    counted,
    draw_constant,
    label_below,
    label_left,
    legend_handles,
    panels_by_task,
    require,
    seeds_text,
)
from hadamard_toolkit.plotting.style import FAINT, GRID, INK, SEQUENTIAL, frame, looks, new_figure, style

MARGIN = 0.01  # above one answer for all rows, up to which nothing was learned; that of `studies.mark_failed`
APART = 0.09  # layers between the bars of neighbouring rules
BAR = 0.5  # layers, the width of a grey bar that stands alone
RULE_ORDER = ("greedy", "norm", "consensus", "first", "last", "taylor", "fisher")
RULE_NAMES = {
    "greedy": "greedy on held-out rows",
    "norm": "least moved first",
    "consensus": "consensus of other tasks",
    "first": "layer 0 first",
    "last": "last layer first",
    "taylor": "least Taylor score first",
    "fisher": "least Fisher score first",
}


def importance_by_layer(table: pd.DataFrame, *, value: str = "rms", venue: str | None = None) -> Figure:
    """How far each layer's vectors moved: a panel per task, W − 1 and b told apart by colour and mark.

    Table: `task`, `seed`, `layer`, `vector` and `value`'s column, as `studies.layers.layer_importance` gives it; rows
    of the vector `"both"` are not drawn. Mark: mean over seeds; line: least to most seed. All panels have one vertical
    axis, so that tasks can be compared.
    """
    table = require(table, "task", "seed", "layer", "vector", value, numbers=("layer", value))
    table = table[table["vector"].isin(VECTOR_TITLES)]
    if table.empty:
        raise ArgumentError(f"table['vector'] holds none of {list(VECTOR_TITLES)}; there is nothing to draw")
    shown = [vector for vector in VECTOR_TITLES if (table["vector"] == vector).any()]
    with style():
        figure, panels, height = panels_by_task(table["task"], venue, height=1.05)
        drawn = looks(shown)
        for axis, (task, rows) in zip(panels, table.groupby("task", sort=False, observed=True), strict=True):
            for place, (vector, look) in enumerate(drawn.items()):
                by_layer = rows[rows["vector"] == vector].groupby("layer")[value]
                at = by_layer.mean().index.to_numpy(dtype=float) + 0.2 * (place - (len(drawn) - 1) / 2)
                axis.vlines(at, by_layer.min(), by_layer.max(), color=look.colour, linewidth=1.0, zorder=2)
                axis.plot(at, by_layer.mean(), look.marker, color=look.colour, zorder=3, **EDGED)
            axis.set_title(str(task))
            axis.set_ylim(0, 1.08 * float(table[value].max()))
            axis.grid(axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 4, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        label_left(panels, "RMS per\ncoordinate" if value == "rms" else "Norm")
        label_below(panels, "Layer")
        several = table.groupby("task", observed=True)["seed"].nunique().max() > 1
        spread = f"Mark: mean, line: least to most of {seeds_text(table, 'task')} per task."
        note = spread if several else "One seed per task, so no spread."
        handles = legend_handles({VECTOR_TITLES[str(name)]: look for name, look in drawn.items()}, line="-")
        frame(figure, height, handles=handles, note=note)
    return figure


def score_by_layers_kept(
    curves: pd.DataFrame,
    band: pd.DataFrame | None = None,
    *,
    metric: str = "Score",
    venue: str | None = None,
) -> Figure:
    """Score against the number of layers kept: one panel per task, a line per rule, all subsets as a grey band.

    `curves`: `task`, `seed`, `rule`, `size`, `score`, `full` (`studies.layers.removal_curves`); the line is the mean
    over seeds, a bar the least to the most that a seed loses against its own `full`. Optional: `constant`, what one
    answer for all rows scores (`studies.constant_score`), a dotted line; a task whose `full` is at most 0.01 above it
    is marked as having learned nothing, and its panel spans as much as the median panel, so that noise does not fill
    it.

    `band`: `task`, `size`, `low`, `middle`, `high` (`studies.layers.subset_band`): the band spans the middle 90 % of
    the subsets of that size, the thin line is their median. The dashed line across is the score of all layers.
    """
    curves = require(
        curves, "task", "seed", "rule", "size", "score", "full", numbers=("size", "score", "full")
    )
    curves = curves.assign(change=curves["score"] - curves["full"])
    if band is not None:
        band = require(
            band, "task", "size", "low", "middle", "high", numbers=("size", "low", "middle", "high")
        )
    rules = list(dict.fromkeys(curves["rule"]))
    known = [rule for rule in RULE_ORDER if rule in rules]
    everything = looks((*RULE_ORDER, *(rule for rule in rules if rule not in RULE_ORDER)))
    drawn = {rule: everything[rule] for rule in (*known, *(rule for rule in rules if rule not in known))}
    with style():
        figure, panels, height = panels_by_task(curves["task"], venue, height=1.35)
        for axis, (task, rows) in zip(panels, curves.groupby("task", sort=False, observed=True), strict=True):
            if band is not None:
                _band(axis, band[band["task"] == task])
            full = rows.drop_duplicates("seed")["full"].mean()
            axis.axhline(full, color=INK, linewidth=0.8, linestyle=DASHED, zorder=2)
            for place, (rule, look) in enumerate(drawn.items()):
                by_size = rows[rows["rule"] == rule].groupby("size")
                mean, change = by_size["score"].mean(), by_size["change"]
                at = mean.index.to_numpy(dtype=float) + APART * (place - (len(drawn) - 1) / 2)
                low, high = (mean - change.mean() + end for end in (change.min(), change.max()))
                axis.vlines(at, low, high, color=look.colour, linewidth=0.6, alpha=0.7, zorder=3)
                line: dict[str, Any] = {
                    "marker": look.marker,
                    "linestyle": look.line,
                    "markersize": 2.8,
                    **EDGED,
                }
                axis.plot(at, mean, color=look.colour, linewidth=0.9, zorder=5 - place / 10, **line)
            draw_constant(axis, rows)
            axis.set_title(str(task))
            axis.invert_xaxis()
            axis.grid(axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 4, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        _calm(panels, curves)
        label_left(panels, metric)
        label_below(panels, "Layers kept")
        handles = legend_handles({RULE_NAMES.get(str(rule), rule): look for rule, look in drawn.items()})
        note = f"Mean of {seeds_text(curves, 'task')} per task; nothing is retrained. Dashed: all layers."
        if curves.groupby("task", observed=True)["seed"].nunique().max() > 1:
            note += " Bars: the least to the most that a seed loses."
        note += constant_note(curves)
        if band is not None:
            note += " Grey: middle 90 % of the subsets of that size and their median, each subset averaged over seeds."
        frame(figure, height, handles=handles, note=note)
    return figure


def layers_kept_by_task(table: pd.DataFrame, *, venue: str = "acl-column") -> Figure:
    """Which layers are kept: tasks by layers, the share of runs in colour and in figures; the mean over tasks below.

    Table: `task`, `layer`, `share` (0..1), `size` (layers kept), `n_runs`, as `studies.kept_share` gives it. With a
    column `confirmed` (sizes of `studies.smallest_set`) only tasks whose smaller set held on test rows are drawn, and
    the note names the others: what was not shown to be enough is not drawn as if it were.
    """
    table = require(
        table, "task", "layer", "share", "size", "n_runs", numbers=("layer", "share", "size", "n_runs")
    )
    if ((table["share"] < 0) | (table["share"] > 1)).any():
        raise ArgumentError("table['share'] holds values outside 0..1; it is a share of runs")
    left_out: list[Any] = []
    if "confirmed" in table.columns:
        holds = table["confirmed"].astype(bool)
        left_out, table = list(dict.fromkeys(table.loc[~holds, "task"])), table[holds]
        if table.empty:
            raise ArgumentError(
                "table['confirmed'] is False for every task; no smaller set was shown to be enough"
            )
    tasks = list(dict.fromkeys(table["task"]))
    wide = table.pivot(index="task", columns="layer", values="share").loc[tasks]
    sizes = table.drop_duplicates("task").set_index("task")["size"]
    shown = np.vstack([wide.to_numpy(), np.full((1, wide.shape[1]), np.nan), wide.mean().to_numpy()[None]])
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        colours = mpl.colormaps[SEQUENTIAL]
        axis.imshow(shown, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shown):
            if np.isfinite(share):
                ink = "white" if share < 0.55 else INK
                place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 5.5, "color": ink}
                axis.text(column, row, f"{100 * share:.0f}", **place)
        axis.set_xticks(range(wide.shape[1]), [str(layer) for layer in wide.columns])
        rows = [*range(len(tasks)), len(tasks) + 1]
        axis.set_yticks(rows, [*(f"{task} ({sizes[task]:.0f})" for task in tasks), "mean of tasks"])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel("Layer")
        count = counted(table["n_runs"])
        note = f"Share of runs, %, that keep the layer; n = {count} per task; in brackets: how many layers are kept."
        if left_out:
            names = ", ".join(map(str, left_out))
            note += f" Not drawn, as no smaller set was shown to be enough: {names}."
        frame(figure, 0.45 + 0.16 * len(shown), note=note)
    return figure


def _calm(panels: Sequence[Axes], curves: pd.DataFrame) -> None:
    """Mark the panels of tasks that were not learned, and let them span as much as the median panel."""
    if "constant" not in curves.columns:
        return
    spans = [axis.get_ylim()[1] - axis.get_ylim()[0] for axis in panels]
    means = curves.groupby("task", sort=False, observed=True)[["full", "constant"]].mean()
    for axis, span, (full, constant) in zip(panels, spans, means.to_numpy(), strict=True):
        if full <= constant + MARGIN:
            middle, half = sum(axis.get_ylim()) / 2, max(span, float(np.median(spans))) / 2
            axis.set_ylim(middle - half, middle + half)
            axis.text(
                0.97, 0.95, "nothing learned", transform=axis.transAxes, ha="right", va="top", fontsize=6
            )


def _band(axis: Axes, rows: pd.DataFrame) -> None:
    """The band from size to next size; a bar for a size without a neighbour, so that nothing is drawn in between."""
    rows = rows.sort_values("size")
    for _, part in rows.groupby((rows["size"].diff() != 1).cumsum()):
        size, middle = part["size"].to_numpy(dtype=float), part["middle"].to_numpy(dtype=float)
        low, high = part["low"].to_numpy(dtype=float), part["high"].to_numpy(dtype=float)
        if len(part) == 1:
            size = np.array([size[0] - BAR / 2, size[0] + BAR / 2])
            low, middle, high = (np.repeat(values, 2) for values in (low, middle, high))
        axis.fill_between(size, low, high, color=GRID, linewidth=0, zorder=0)
        axis.plot(size, middle, color=FAINT, linewidth=0.7, zorder=1)
