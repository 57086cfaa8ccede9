"""Scores with every subset of a method's parts: a column per subset, with dots below for the parts in it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.plotting.panels import DASHED, counted, require
from hadamard_toolkit.plotting.style import FAINT, GRID, INK, frame, looks, new_figure, style
from hadamard_toolkit.studies.ablation import CELLS, PARTS, SYMBOLS, cell_name

HEIGHT = 1.35  # inches of a row of panels
MATRIX = 0.5  # of the dots below
SPREAD = 0.12  # columns between the marks of neighbouring seeds


def ablation_grid(table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score") -> Figure:
    """Score with every subset of {W, b, norm}: a mark per seed, a bar at their mean; the empty subset is HeadOnly.

    Table: that of `studies.ablation.ablation_table`. A panel per task, eight columns each; below them a filled dot
    for every part that trains. The dashed line is the mean of the empty subset. A cell without runs stays empty.
    """
    table = require(table, "task", "seed", "cell", "score", numbers=("score",))
    tasks = list(table["task"].unique())
    names = [cell_name(*cell) for cell in CELLS]
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(
            2,
            len(tasks),
            sharex=True,
            squeeze=False,
            height_ratios=[HEIGHT, MATRIX],
        )
        for column, task in enumerate(tasks):
            _scores(axes[0, column], table[table["task"] == task], names)
            axes[0, column].set_title(task)
            _matrix(axes[1, column], named=column == 0)
        axes[0, 0].set_ylabel(metric)
        counts = table.groupby(["task", "cell"])["seed"].nunique()
        missing = len(tasks) * len(names) - len(counts)
        note = (
            f"Mark: one run, bar: mean of {counted(counts, 'seed')} per cell. Dashed: nothing but the head."
        )
        note += f" {missing} of {len(tasks) * len(names)} cells have no run." if missing else ""
        frame(figure, HEIGHT + MATRIX + 0.35, note=note)
    return figure


def _scores(axis: Axes, part: pd.DataFrame, names: list[str]) -> None:
    look = looks(["run"])["run"]
    for place, name in enumerate(names):
        scores = part[part["cell"] == name].sort_values("seed")["score"].to_numpy()
        if not len(scores):
            continue
        across = [place + SPREAD * (i - (len(scores) - 1) / 2) for i in range(len(scores))]
        axis.plot(across, scores, look.marker, color=look.colour, markersize=3, alpha=0.75)
        axis.hlines(scores.mean(), place - 0.34, place + 0.34, color=INK, linewidth=1.4)
        if name == names[0]:
            axis.axhline(scores.mean(), color=FAINT, linewidth=0.7, linestyle=DASHED, zorder=1)
    axis.grid(axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(bottom=False)


def _matrix(axis: Axes, *, named: bool) -> None:
    """Filled dots for the parts of every cell, joined by a line, hollow ones for those left out."""
    height = {part: len(PARTS) - 1 - place for place, part in enumerate(PARTS)}
    for place, cell in enumerate(CELLS):
        there = [height[part] for part, chosen in zip(PARTS, cell, strict=True) if chosen]
        gone = [height[part] for part, chosen in zip(PARTS, cell, strict=True) if not chosen]
        axis.plot([place] * len(gone), gone, "o", color=GRID, markersize=4)
        axis.plot([place] * len(there), there, "-o", color=INK, markersize=4, linewidth=1)
    axis.set_ylim(-0.6, len(PARTS) - 0.4)
    axis.set_xlim(-0.6, len(CELLS) - 0.4)
    axis.set_xticks([])
    axis.set_yticks(
        list(height.values()), [SYMBOLS[part] for part in height] if named else [""] * len(height)
    )
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
