"""What training does to self-attention outputs, layer by layer: norms before and after, and the fits between them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import counted, legend_handles, require
from hadamard_toolkit.plotting.style import FAINT, INK, frame, looks, new_figure, style
from hadamard_toolkit.studies.attention_shift import FITS

HEIGHT = 1.35  # inches of a row of panels
DODGE = 0.12  # layers between neighbours at one layer
BEFORE = (0, (2, 1.2))  # the line of what training started from
CURVED = ("quadratic", "cubic")


def attention_norms(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """Norm of the self-attention outputs by layer, before and after training, and the paired change with its interval.

    Table: that of `studies.attention_shift.norm_shift`, at most eight tasks. A column per `method`, each with axes of
    its own, as methods differ by an order of magnitude. Above, mean `before` (dashed) and `after` (solid) by task;
    below, `difference` with `low` to `high`, tasks side by side; the note says what these intervals hold for.
    """
    numbers = ("layer", "before", "after", "difference", "low", "high", "n_examples", "n_seeds")
    table = require(table, "task", "method", *numbers, numbers=numbers)
    methods, tasks = list(table["method"].unique()), list(table["task"].unique())
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(2, len(methods), sharex=True, squeeze=False)
        drawn = looks(tasks)
        for method, (above, below) in zip(methods, axes.T, strict=True):
            above.set_title(method)
            below.axhline(0, color=INK, linewidth=0.7)
            for place, task in enumerate(tasks):
                part = table[(table["method"] == method) & (table["task"] == task)].sort_values("layer")
                look, layers = drawn[task], part["layer"].to_numpy(float)
                above.plot(layers, part["before"], color=look.colour, linestyle=BEFORE, linewidth=0.9)
                above.plot(layers, part["after"], color=look.colour, marker=look.marker)
                across = layers + DODGE * (place - (len(tasks) - 1) / 2)
                below.vlines(across, part["low"], part["high"], color=look.colour, linewidth=1.1)
                below.plot(across, part["difference"], look.marker, color=look.colour)
        _label_axes(axes, table)
        axes[0, 0].set_ylabel("Mean norm per token")
        axes[1, 0].set_ylabel("After − before")
        handles = [
            *legend_handles(drawn, line="-"),
            Line2D([], [], label="before", color=FAINT, linestyle=BEFORE),
        ]
        own_axes = " Each method has its own axes." if len(methods) > 1 else ""
        note = (
            f"{_counts(table)} Bars: interval, paired by example, for {_population(table)}. Padding left out."
            f"{own_axes}"
        )
        frame(figure, 2 * HEIGHT, handles=handles, note=note)
    return figure


def fit_comparison(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """How well a polynomial in one coordinate before training gives it after: held-out R² by layer and degree.

    Table: that of `studies.attention_shift.fit_summary`. A column per `method`. Above, `r2` of the coordinate unchanged
    and of the line through it: a mark per task, a line through their mean. Below, what curves add to the line, which
    is too little to be seen above: the `gain` of quadratic over linear and of cubic over quadratic, with `gain_low` to
    `gain_high`, tasks side by side.
    """
    numbers = ("layer", "r2", "n_examples", "n_seeds")
    table = require(
        table, "task", "method", "fit", *numbers, "gain", "gain_low", "gain_high", numbers=numbers
    )
    if unknown := set(table["fit"]) - set(FITS):
        raise ArgumentError(
            f"table['fit'] holds {', '.join(map(repr, sorted(unknown)))}; known are {', '.join(FITS)}"
        )
    methods, tasks = list(table["method"].unique()), list(table["task"].unique())
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(2, len(methods), sharex=True, sharey="row", squeeze=False)
        drawn = looks(FITS)
        for method, (above, below) in zip(methods, axes.T, strict=True):
            above.set_title(method)
            below.axhline(0, color=INK, linewidth=0.7)
            of_method = table[table["method"] == method]
            for fit, look in drawn.items():
                part = of_method[of_method["fit"] == fit]
                if fit not in CURVED:
                    dots = {"color": look.colour, "markersize": 2.2, "alpha": 0.6}
                    above.plot(part["layer"], part["r2"], look.marker, **dots)
                    mean = part.groupby("layer")["r2"].mean()
                    above.plot(mean.index, mean, color=look.colour, linestyle=look.line)
                    continue
                side = -0.2 if fit == CURVED[0] else 0.2
                for place, task in enumerate(tasks):
                    rows = part[part["task"] == task]
                    across = rows["layer"] + side + 0.07 * (place - (len(tasks) - 1) / 2)
                    below.vlines(
                        across, rows["gain_low"], rows["gain_high"], color=look.colour, linewidth=0.9
                    )
                    below.plot(across, rows["gain"], look.marker, color=look.colour, markersize=2.6)
        _label_axes(axes, table)
        axes[0, 0].set_ylabel("Held-out R²")
        axes[1, 0].set_ylabel("Gain over one\ndegree less")
        note = (
            f"{_counts(table)} Above: mark per task, line through their mean. Below: one mark per task, bars: interval "
            "over held-out examples. Each coordinate by itself, fitted on the other half of the examples."
        )
        frame(figure, 2 * HEIGHT, handles=legend_handles(drawn), note=note)
    return figure


def _label_axes(axes: np.ndarray, table: pd.DataFrame) -> None:
    panel: Axes
    for panel in axes.flat:
        panel.grid(axis="y")
        panel.yaxis.set_major_locator(MaxNLocator(5))
    for panel in axes[-1]:
        panel.set_xticks(sorted(table["layer"].unique()))
        panel.set_xlabel("Layer")


def _population(table: pd.DataFrame) -> str:
    """What the intervals of `norm_shift` hold for."""
    if table["n_seeds"].max() == 1:
        return "other texts and these trained models"
    several = "other seeds and other texts"
    return several if table["n_seeds"].min() > 1 else f"{several} (one seed: for other texts only)"


def _counts(table: pd.DataFrame) -> str:
    """How many examples and seeds are behind each mark, in words."""
    return f"{counted(table['n_examples'], 'text')}, {counted(table['n_seeds'], 'seed')} per task."
