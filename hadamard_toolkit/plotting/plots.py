"""The figures: each function checks a tidy table and returns a figure; nothing is saved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.adapters.hadamard import IDENTITY
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    DOTTED,
    EDGED,
    VECTOR_TITLES,
    check_one_row,
    constant_note,
    counted,
    draw_constant,
    label_below,
    legend_handles,
    panels_by_task,
    readable,
    require,
    seeds_text,
    stripes,
)
from hadamard_toolkit.plotting.style import FAINT, Look, frame, looks, new_figure, style


def vectors_by_layer(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """How far each layer's Hadamard vectors moved from the identity, by task.

    Table: one row per learned coordinate: `task`, `layer` (from 0), `vector` (`"weight"` or `"bias"`), `value` (the
    entry of W or b itself; the figure shows W − 1 and b, the distances from the identity). Seeds, if there is a column
    `seed`, are pooled and counted. Drawn per layer and task: median (mark), middle 50 % (bar) and middle 90 % (line) of
    the coordinates. The outer 10 % is left out: a few outlier coordinates would flatten all else. At most eight tasks.
    """
    table = require(table, "task", "layer", "vector", "value", numbers=("layer", "value"))
    unknown = set(table["vector"]) - set(IDENTITY)
    if unknown:
        raise ArgumentError(f"table['vector'] holds {sorted(unknown)}; allowed are {sorted(IDENTITY)}")
    shown = [vector for vector in IDENTITY if (table["vector"] == vector).any()]
    layers = sorted(int(layer) for layer in table["layer"].unique())
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        drawn = looks(table["task"])
        for axis, vector in zip(axes, shown, strict=True):
            part = table[table["vector"] == vector]
            stripes(axis, len(layers))
            axis.axhline(0, color=FAINT, linewidth=0.6, zorder=1)
            for place, (task, look) in enumerate(drawn.items()):
                offset = (place - (len(drawn) - 1) / 2) * min(0.8 / len(drawn), 0.22)
                of_task = part[part["task"] == task]
                for column, layer in enumerate(layers):
                    values = of_task.loc[of_task["layer"] == layer, "value"].to_numpy(dtype=float)
                    if values.size:
                        _spread(axis, column + offset, values - IDENTITY[vector], look)
            axis.set_title(VECTOR_TITLES[vector])
            axis.yaxis.set_major_locator(MaxNLocator(6, symmetric=True, steps=[1, 2, 4, 5, 10]))
            axis.tick_params(axis="x", length=0)
        axes[-1].set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes[-1].set_xlim(-0.5, len(layers) - 0.5)
        axes[-1].set_xlabel("Layer")
        note = f"Mark: median; bar: middle 50 %; line: middle 90 % of {_counted(table)}. The outer 10 % is not drawn."
        frame(figure, 1.3 * len(shown) + 0.25, handles=legend_handles(drawn, wide=True), note=note)
    return figure


def training_curves(table: pd.DataFrame, *, split: str = "validation", venue: str | None = None) -> Figure:
    """The course of training: one panel per task, one line per method (mean over seeds, band from worst to best).

    Table: `method`, `task`, `seed`, `stage`, `epoch`, `split`, `metric`, `value`. Only rows of `split` are drawn;
    within a task they must share one metric. Stages follow one another on the axis, in the order in which they first
    appear for a method; a dotted line marks where the next begins.
    """
    columns = ("method", "task", "seed", "stage", "epoch", "split", "metric", "value")
    table = require(table, *columns, numbers=("epoch", "value"))
    part = table[table["split"] == split]
    if part.empty:
        raise ArgumentError(
            f"split={split!r} is not in the table; it has {sorted(map(str, table['split'].unique()))}"
        )
    part = _in_sequence(part)
    with style():
        figure, panels, height = panels_by_task(part["task"], venue, height=1.4)
        drawn = looks(part["method"])
        for axis, (task, rows) in zip(panels, part.groupby("task", sort=False, observed=True), strict=True):
            metrics = rows["metric"].unique()
            if len(metrics) > 1:
                raise ArgumentError(
                    f"table['metric'] holds {sorted(metrics)} for task {task!r}; keep one per task"
                )
            switches: set[float] = set()
            for method, of_method in rows.groupby("method", sort=False, observed=True):
                _curve(axis, of_method, drawn[method])
                switches |= set(of_method.groupby("stage", sort=False, observed=True)["step"].max().iloc[:-1])
            for switch in sorted(switches):
                axis.axvline(switch + 0.5, color=FAINT, linewidth=0.7, linestyle=DOTTED, zorder=1)
            axis.set_title(str(task))
            axis.set_ylabel(readable(str(metrics[0])))
            axis.grid(axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        label_below(panels, "Epoch, all stages" if part["stage"].nunique() > 1 else "Epoch")
        seeds = part["seed"].nunique()
        note = f"{readable(split)} rows. " + ("Line: mean, band: worst to best of " if seeds > 1 else "From ")
        note += seeds_text(part, "task", "method") + ". "
        note += "Dotted: a method's next stage begins." if part["stage"].nunique() > 1 else ""
        frame(figure, height, handles=legend_handles(drawn), note=note)
    return figure


def score_by_method(table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score") -> Figure:
    """Every run's score: one panel per task, one row per method, a dot per seed, mean and ± one standard deviation.

    Table: `task`, `method`, `seed`, `score`, one row per run. Optional: `constant`, what one answer for all rows scores
    (`studies.mark_failed` adds it), a dotted line. Methods keep the order of the table, the first on top. With one seed
    no spread is drawn, and the note says so.
    """
    table = require(table, "task", "method", "seed", "score", numbers=("score",))
    check_one_row(table, "task", "method", "seed", hint="one row per task, method and seed is drawn")
    methods = list(dict.fromkeys(table["method"]))
    with style():
        figure, panels, height = panels_by_task(
            table["task"], venue, height=0.42 + 0.19 * len(methods), labels=methods
        )
        drawn = looks(methods)
        for axis, (task, rows) in zip(panels, table.groupby("task", sort=False, observed=True), strict=True):
            for place, method in enumerate(methods):
                scores = rows.loc[rows["method"] == method, "score"].to_numpy(dtype=float)
                _row(axis, place, scores, drawn[method])
            draw_constant(axis, rows, vertical=True)
            axis.set_title(str(task))
            axis.set_ylim(len(methods) - 0.4, -0.6)
            axis.set_yticks(range(len(methods)), [str(method) for method in methods])
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x")
            axis.margins(x=0.12)
            axis.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        label_below(panels, metric)
        seeds = table.groupby(["task", "method"], observed=True)["seed"].nunique()
        spread = "mean ± one standard deviation" if seeds.max() > 1 else "one run, so no spread"
        # the spaces around "=" do not break
        note = f"Large mark: {spread}. Small dots: the seeds, n\u00a0=\u00a0{counted(seeds)} per method and task."
        frame(figure, height, note=note + constant_note(table))
    return figure


def _spread(axis: Axes, at: float, values: np.ndarray, look: Look) -> None:
    five, quarter, middle, three_quarters, ninety_five = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    axis.vlines(at, five, ninety_five, color=look.colour, linewidth=0.9, zorder=2)
    axis.vlines(at, quarter, three_quarters, color=look.colour, linewidth=3.2, zorder=3)
    axis.plot(at, middle, look.marker, color=look.colour, markersize=4.2, zorder=4, **EDGED)


def _in_sequence(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `step`: the epoch counted on over the stages of each method and task."""
    parts = []
    for _, rows in table.groupby(["task", "method"], sort=False, observed=True):
        before = 0.0
        for _, stage in rows.groupby("stage", sort=False, observed=True):
            parts.append(stage.assign(step=stage["epoch"] + before))
            before += float(stage["epoch"].max())
    return pd.concat(parts)


def _curve(axis: Axes, rows: pd.DataFrame, look: Look) -> None:
    by_step = rows.groupby("step")["value"]
    mean, least, most = by_step.mean(), by_step.min(), by_step.max()
    steps = mean.index.to_numpy()
    axis.fill_between(steps, least, most, color=look.colour, alpha=0.18, linewidth=0)
    line: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, **EDGED}
    axis.plot(steps, mean, markevery=max(1, math.ceil(len(steps) / 6)), **line)


def _row(axis: Axes, place: int, scores: np.ndarray, look: Look) -> None:
    if not scores.size:
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right"}
        axis.annotate("not run", (0.98, place), fontsize=5.5, color=FAINT, **at)
        return
    mean = scores.mean()
    if scores.size > 1:
        deviation = scores.std(ddof=1)
        axis.hlines(place, mean - deviation, mean + deviation, color=look.colour, linewidth=1.6, zorder=3)
    beneath = np.full(scores.size, place + 0.3)
    axis.plot(scores, beneath, "o", color=look.colour, alpha=0.6, markersize=2, markeredgewidth=0)
    axis.plot(mean, place, look.marker, color=look.colour, markersize=4.8, zorder=4, **EDGED)


def _counted(table: pd.DataFrame) -> str:
    by = ["task", "layer", "vector"]
    if "seed" not in table.columns:
        return f"{table.groupby(by, observed=True).size().max()} coordinates"
    return f"{table.groupby([*by, 'seed'], observed=True).size().max()} coordinates in {seeds_text(table, 'task')}"
