"""How alike tasks are: matrices, the course over layers between floor and ceiling, and what a transplant brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import EDGED, label_below, legend_handles, plural, require
from hadamard_toolkit.plotting.style import FAINT, INK, SEQUENTIAL, centred, frame, looks, new_figure, style

TITLES = {"weight": "W − 1", "bias": "b"}
QUANTITIES = {
    "within": "same task, other seed",
    "between": "other task, other seed",
    "floor": "coordinates permuted",
}
KINDS = {"own": "own vectors", "source": "another task's", "permuted": "another task's, permuted"}
MISSING = "#f2f2f2"


def similarity_matrices(
    table: pd.DataFrame,
    *,
    order: Sequence[str] | None = None,
    venue: str | None = None,
    measure: str = "Cosine",
    value: str = "value",
) -> Figure:
    """Similarity of every two tasks, one panel per vector; the diagonal is each task with itself under another seed.

    Table: `task_a`, `task_b`, `vector`, `floor_high` and the column `value`, one row per pair and vector, as one
    cell of `similarity_summary`. `order`: the tasks from top to bottom, such as that of a clustering; else as in the
    table. The diagonal, framed, is the ceiling; the note states the largest `floor_high`, which permuted coordinates
    reach. Pairs that are missing stay blank.
    """
    table = require(table, "task_a", "task_b", "vector", value, "floor_high", numbers=("floor_high",))
    if (twice := table.duplicated(["task_a", "task_b", "vector"])).any():
        first = table.loc[twice, ["task_a", "task_b", "vector"]].iloc[0].to_dict()
        raise ArgumentError(f"table has more than one row for {first}; keep one layer, measure and `removed`")
    tasks = list(dict.fromkeys([*table["task_a"], *table["task_b"]]))
    if order is not None and set(order) != set(tasks):
        raise ArgumentError(f"order={list(order)} is not allowed; the table's tasks are {tasks}")
    names = list(order or tasks)
    vectors = sorted(set(table["vector"]), key=_place)
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(1, len(vectors), sharey=True, squeeze=False)[0]
        for axis, vector in zip(axes, vectors, strict=True):
            matrix = _square(table[table["vector"] == vector], names, value)
            colours, norm = _colours(matrix)
            heat(axis, matrix, colours, norm, names, names)
            for place in range(len(names)):
                corner = place - 0.5, place - 0.5
                for colour, width in (("white", 1.6), (INK, 0.7)):  # seen on dark cells and on light ones
                    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))
            axis.set_title(TITLES.get(str(vector), str(vector)))
        floors = table.groupby("vector")["floor_high"].max()
        said = ", ".join(f"{TITLES.get(str(name), str(name))} {floors[name]:.2f}" for name in vectors)
        width = (figure.get_figwidth() - 0.06 * max(map(len, names)) - 0.2) / len(vectors)
        counted = ""
        if "pairs" in table.columns:
            counted = f"{table['pairs'].min()} to {table['pairs'].max()} "
        note = (
            f"{measure}, mean over {counted}pairs of runs with different seeds. Framed: the ceiling, a task with "
            f"itself. The floor, up to which permuted coordinates reach (95 %): {said}."
        )
        frame(figure, width + 0.25 + 0.045 * max(map(len, names)), note=note)
    return figure


def similarity_by_layer(table: pd.DataFrame, *, venue: str | None = None, measure: str = "Cosine") -> Figure:
    """How alike tasks are in each layer, between the ceiling and the floor; one panel per vector.

    Table: `vector`, `layer` (from 0), `quantity` (`"within"`, the ceiling, `"between"`, `"floor"`), `value`, `low`,
    `high`: rows of `similarity_contrast` for one measure and `removed`. Lines are values, bands their intervals.
    """
    table = require(table, "vector", "layer", "quantity", "value", "low", "high", numbers=("layer", "value"))
    shown = table[table["quantity"].isin(QUANTITIES) & (table["layer"] >= 0)]
    if shown.duplicated(["vector", "layer", "quantity"]).any() or shown.empty:
        raise ArgumentError(
            "table must have one row per vector, layer (from 0) and quantity; keep one measure and one `removed`"
        )
    vectors = sorted(set(shown["vector"]), key=_place)
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(1, len(vectors), sharey=True, squeeze=False)[0]
        drawn = looks(QUANTITIES)
        for axis, vector in zip(axes, vectors, strict=True):
            axis.axhline(0, color=FAINT, linewidth=0.6, zorder=1)
            for quantity, look in drawn.items():
                rows = shown[(shown["vector"] == vector) & (shown["quantity"] == quantity)].sort_values(
                    "layer"
                )
                axis.fill_between(
                    rows["layer"], rows["low"], rows["high"], color=look.colour, alpha=0.18, linewidth=0
                )
                shape: dict[str, Any] = {"marker": look.marker, "linestyle": look.line, **EDGED}
                axis.plot(rows["layer"], rows["value"], color=look.colour, zorder=3, **shape)
            axis.set_title(TITLES.get(str(vector), str(vector)))
            axis.grid(axis="y")
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes[0].set_ylabel(measure)
        label_below(list(axes), "Layer")
        handles = legend_handles({QUANTITIES[str(name)]: look for name, look in drawn.items()})
        tasks = f" of {int(shown['tasks'].max())} tasks" if "tasks" in shown.columns else ""
        note = f"Line: mean, band: 95 % interval for other tasks (jackknife{tasks}). Other seeds are the ceiling of "
        note += "the same measure, permuted coordinates its floor."
        frame(figure, 1.6, handles=handles, note=note)
    return figure


def transplant_gains(table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score") -> Figure:
    """What another task's vectors bring: one panel per head, one row per target task, marks by whose vectors they are.

    Table: `task` (the target), `kind` (`"own"`, `"source"`, `"permuted"`, `"none"`), `head`, `score`, one row per
    measured model. Drawn: the score minus that of the bare backbone (`"none"`) with the same head, mean over seeds if
    there are several; each source a small mark, their mean a bar.
    """
    table = require(table, "task", "kind", "head", "score", numbers=("score",))
    bare = table[table["kind"] == "none"].groupby(["task", "head"])["score"].mean()
    if lacking := set(zip(table["task"], table["head"], strict=True)) - set(bare.index):
        raise ArgumentError(f"table has no row of kind 'none' for {sorted(lacking)}; gains are over it")
    index = pd.MultiIndex.from_frame(table[["task", "head"]])
    gains = table.assign(gain=table["score"].to_numpy() - bare.reindex(index).to_numpy())
    tasks, heads = list(dict.fromkeys(table["task"])), list(dict.fromkeys(table["head"]))
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
        drawn = looks(KINDS)
        for axis, head in zip(axes, heads, strict=True):
            axis.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
            for place, task in enumerate(tasks):
                rows = gains[(gains["task"] == task) & (gains["head"] == head)]
                for offset, (kind, look) in zip((-0.24, 0.0, 0.24), drawn.items(), strict=True):
                    values = rows.loc[rows["kind"] == kind, "gain"].to_numpy(dtype=float)
                    if not values.size:
                        continue
                    at = np.full(values.size, place + offset)
                    look_of: dict[str, Any] = {"color": look.colour, "markeredgewidth": 0, "linestyle": ""}
                    axis.plot(values, at, look.marker, markersize=3.4, alpha=0.7, zorder=3, **look_of)
                    if values.size > 1:
                        ends = at[0] - 0.11, at[0] + 0.11
                        axis.vlines(values.mean(), *ends, color=look.colour, linewidth=1.6)
            axis.set_title(f"{head.capitalize()} head")
            axis.set_ylim(len(tasks) - 0.45, -0.55)
            axis.set_yticks(range(len(tasks)), [str(task) for task in tasks])
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x")
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        label_below(list(axes), f"{metric} gained")
        handles = [
            Line2D([], [], color=look.colour, marker=look.marker, linestyle="", label=KINDS[str(kind)])
            for kind, look in drawn.items()
        ]
        counts = gains[gains["kind"] == "source"].groupby(["task", "head"]).size()
        many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        seeds = f" {plural(table['seed'].nunique(), 'seed')}." if "seed" in table.columns else ""
        note = f"Small marks: single models, {many} sources per target; bars: their means. Gained: over the "
        note += f"bare backbone with the same kind of head.{seeds}"
        frame(figure, 0.5 + 0.34 * len(tasks), handles=handles, note=note)
    return figure


def heat(
    axis: Axes,
    matrix: np.ndarray,
    colours: Colormap,
    norm: Normalize,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    text: str = ".2f",
    size: float = 5.0,
) -> None:
    """A matrix as coloured cells with their values written in; missing ones are blank."""
    axis.set_facecolor(MISSING)
    axis.imshow(
        np.ma.masked_invalid(matrix), cmap=colours, norm=norm, aspect="equal", interpolation="nearest"
    )
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            written = format(round(value, 2) + 0.0, text).replace("0.", ".").replace("-", "−")
            axis.text(
                column, row, written, ha="center", va="center", fontsize=size, color="white" if dark else INK
            )
    axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _place(vector: object) -> tuple[int, str]:
    """W before b."""
    known = [*TITLES]
    return known.index(str(vector)) if vector in known else len(known), str(vector)


def _square(part: pd.DataFrame, names: list[str], value: str) -> np.ndarray:
    place = {name: index for index, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    for a, b, entry in part[["task_a", "task_b", value]].itertuples(index=False, name=None):
        matrix[place[a], place[b]] = matrix[place[b], place[a]] = entry
    return matrix


def _colours(matrix: np.ndarray) -> tuple[Colormap, Normalize]:
    """From 0 up where nothing is far below it, else both ways from 0."""
    low, high = np.nanmin(matrix), np.nanmax(matrix)
    if low < -0.25 * abs(high):
        return centred(matrix[np.isfinite(matrix)], 0.0)
    return mpl.colormaps[SEQUENTIAL], Normalize(0, max(high, 1e-9))
