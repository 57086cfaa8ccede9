"""Figures of layer pruning: how far layers moved, what is left without them, which ones tasks agree to keep."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    EDGED,
    VECTOR_TITLES,
    label_below,
    legend_handles,
    panels_by_task,
    require,
    seeds_text,
    stripes,
)
from hadamard_toolkit.plotting.style import FAINT, GRID, INK, SEQUENTIAL, frame, looks, new_figure, style

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
    """How far each layer's vectors moved, W − 1 and b side by side, tasks told apart by colour and mark.

    Table: `task`, `seed`, `layer`, `vector` and `value`'s column, as `studies.layers.layer_importance` gives it; rows
    of the vector `"both"` are not drawn. Mark: mean over seeds; line: least to most seed. At most eight tasks.
    """
    table = require(table, "task", "seed", "layer", "vector", value, numbers=("layer", value))
    shown = [vector for vector in VECTOR_TITLES if (table["vector"] == vector).any()]
    if not shown:
        raise ArgumentError(f"table['vector'] holds none of {list(VECTOR_TITLES)}; there is nothing to draw")
    layers = sorted(int(layer) for layer in table["layer"].unique())
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        drawn = looks(table["task"])
        for axis, vector in zip(axes, shown, strict=True):
            part = table[table["vector"] == vector]
            stripes(axis, len(layers))
            for place, (task, look) in enumerate(drawn.items()):
                offset = (place - (len(drawn) - 1) / 2) * min(0.8 / len(drawn), 0.22)
                by_layer = part[part["task"] == task].groupby("layer")[value]
                at = np.array([layers.index(int(str(layer))) for layer in by_layer.groups]) + offset
                if not len(at):
                    continue
                axis.vlines(at, by_layer.min(), by_layer.max(), color=look.colour, linewidth=1.0, zorder=2)
                mark: dict[str, Any] = {
                    "marker": look.marker,
                    "linestyle": "none",
                    "markersize": 3.4,
                    **EDGED,
                }
                axis.plot(at, by_layer.mean(), color=look.colour, zorder=3, **mark)
            axis.set_ylim(0, 1.08 * float(part[value].max()))
            axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
            axis.set_xlim(-0.5, len(layers) - 0.5)
            axis.tick_params(axis="x", length=0)
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axis.set_title(VECTOR_TITLES[vector])
            axis.set_xlabel("Layer")
        axes[0].set_ylabel("RMS per coordinate" if value == "rms" else "Norm")
        several = table.groupby("task", observed=True)["seed"].nunique().max() > 1
        spread = f"Mark: mean, line: least to most of {seeds_text(table, 'task')} per task."
        note = spread if several else "One seed per task, so no spread."
        frame(figure, 1.55, handles=legend_handles(drawn, wide=True), note=note)
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
    over seeds. `band`: `task`, `size`, `low`, `middle`, `high` (`studies.layers.subset_band`): the band spans the
    middle 90 % of the subsets of that size, the thin line is their median. The dashed line across is the score of all
    layers.
    """
    curves = require(
        curves, "task", "seed", "rule", "size", "score", "full", numbers=("size", "score", "full")
    )
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
            axis.axhline(full, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=2)
            for place, (rule, look) in enumerate(drawn.items()):
                mean = rows[rows["rule"] == rule].groupby("size")["score"].mean()
                line: dict[str, Any] = {"marker": look.marker, "linestyle": look.line, **EDGED}
                axis.plot(mean.index, mean, color=look.colour, linewidth=1.0, zorder=5 - place / 10, **line)
            axis.set_title(str(task))
            axis.invert_xaxis()
            axis.grid(axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 4, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        for axis in panels:
            if axis.get_subplotspec().colspan.start == 0:  # type: ignore[union-attr]
                axis.set_ylabel(metric)
        label_below(panels, "Layers kept")
        handles = legend_handles({RULE_NAMES.get(str(rule), rule): look for rule, look in drawn.items()})
        note = f"Mean of {seeds_text(curves, 'task')} per task; nothing is retrained. Dashed: all layers."
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
        runs = table.drop_duplicates("task")["n_runs"]
        count = f"{runs.min():.0f}" if runs.min() == runs.max() else f"{runs.min():.0f} to {runs.max():.0f}"
        note = f"Share of runs, %, that keep the layer; n = {count} per task; in brackets: how many layers are kept."
        if left_out:
            note += (
                f" Not drawn, as no smaller set was confirmed on test rows: {', '.join(map(str, left_out))}."
            )
        frame(figure, 0.45 + 0.16 * len(shown), note=note)
    return figure


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
