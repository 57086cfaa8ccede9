"""How alike tasks are: matrices, the course over layers between floor and ceiling, and what a transplant brings."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.heat import colour_bar, colour_scale, heat
from hadamard_toolkit.plotting.panels import (
    EDGED,
    check_one_row,
    counted,
    label_below,
    legend_handles,
    plural,
    readable,
    require,
)
from hadamard_toolkit.plotting.style import FAINT, INK, Look, frame, looks, new_figure, style

TITLES = {"weight": "W − 1", "bias": "b"}
QUANTITIES = {
    "within": "same task, other seed",
    "between": "other task, other seed",
    "floor": "coordinates permuted",
}
NARROW = 4.0  # inches, below which matrices stand one above the other
POINTS = {"floor": "floor", "between": "between tasks", "within": "within a task (ceiling)"}
KINDS = {"own": "own vectors", "source": "another task's", "permuted": "another task's, permuted"}


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
    reach. Pairs that are missing stay blank. Both panels have the same colours, which the bar explains.
    """
    table = _one_row_per_pair(table, value)
    table = require(table, "floor_high", numbers=("floor_high",))
    tasks = list(dict.fromkeys([*table["task_a"], *table["task_b"]]))
    if order is not None and set(order) != set(tasks):
        raise ArgumentError(f"order={list(order)} is not allowed; the table's tasks are {tasks}")
    names = list(order or tasks)
    vectors = sorted(set(table["vector"]), key=_place)
    matrices = [_square(table[table["vector"] == vector], names, value) for vector in vectors]
    scale = colour_scale(np.stack(matrices))
    with style():
        figure = new_figure(venue)
        columns = len(vectors) if figure.get_figwidth() > NARROW else 1
        rows = -(-len(vectors) // columns)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, vector, matrix in zip(axes, vectors, matrices, strict=True):
            image = heat(axis, matrix, scale, names, names)
            for place in range(len(names)):
                corner = place - 0.5, place - 0.5
                for colour, width in (("white", 1.6), (INK, 0.7)):  # seen on dark cells and on light ones
                    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))
            axis.set_title(TITLES.get(str(vector), str(vector)))
        colour_bar(figure, image, list(axes), measure)
        floors = table.groupby("vector")["floor_high"].max()
        floor = ", ".join(f"{TITLES.get(str(name), str(name))} {floors[name]:.2f}" for name in vectors)
        counted = ""
        if "pairs" in table.columns:
            counted = f"{table['pairs'].min()} to {table['pairs'].max()} "
        note = (
            f"{measure}, mean over {counted}pairs of runs with different seeds. Framed: the ceiling, a task with "
            f"itself. The floor, up to which permuted coordinates reach (95 %): {floor}."
        )
        widest = max(map(len, names))
        side = (figure.get_figwidth() - 0.06 * widest - 0.65) / columns
        frame(figure, (side + 0.2) * rows + 0.05 + 0.045 * widest, note=note)
    return figure


def number_line(
    table: pd.DataFrame, *, venue: str | None = None, measure: str = "Cosine", value: str = "value"
) -> Figure:
    """How alike tasks are, on a line from the floor to the ceiling: one line per vector, three named points on it.

    Table: as for `similarity_matrices`, with `floor`. The points are means, as in `similarity_contrast`: the floor
    (permuted coordinates, over pairs of different tasks), between tasks, and within a task under another seed, which
    is the ceiling of the same measure. A tick stands for each pair of tasks, a longer one for each task with itself.
    """
    table = _one_row_per_pair(table, value)
    table = require(table, "floor", numbers=("floor", value))
    vectors = sorted(set(table["vector"]), key=_place)
    within = table["task_a"] == table["task_b"]
    for rows, pairs in ((table[within], "a task with itself"), (table[~within], "different tasks")):
        if lacking := set(vectors) - set(rows["vector"]):
            raise ArgumentError(f"table has no pair of {pairs} for vector {sorted(lacking)}")
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        drawn = looks(POINTS)
        for up, vector in enumerate(reversed(vectors)):
            of_vector = table["vector"] == vector
            same, other = table[within & of_vector], table[~within & of_vector]
            points = {
                "floor": other["floor"].mean(),
                "between": other[value].mean(),
                "within": same[value].mean(),
            }
            axis.hlines(up, min(points.values()), max(points.values()), color=FAINT, linewidth=0.8, zorder=1)
            for rows, size in ((other, 3.0), (same, 6.0)):
                axis.plot(
                    rows[value], [up] * len(rows), "|", color=FAINT, alpha=0.6, markersize=size, zorder=2
                )
            sides = zip(
                sorted(points, key=lambda name: points[name]), ("right", "center", "left"), strict=True
            )
            for quantity, side in sides:
                look = drawn[quantity]
                axis.plot(
                    points[quantity], up, look.marker, color=look.colour, markersize=5, zorder=3, **EDGED
                )
                text = f"{POINTS[quantity]}\n{points[quantity] + 0.0:.2f}".replace("-", "−")
                above = side == "center"
                offset = {"right": 4, "center": 0, "left": -4}[side], 5 if above else -5
                axis.annotate(
                    text,
                    (points[quantity], up),
                    offset,
                    textcoords="offset points",
                    ha=side,
                    va="bottom" if above else "top",
                    fontsize=6,
                )
        axis.set_yticks(range(len(vectors)), [TITLES.get(str(name), str(name)) for name in reversed(vectors)])
        axis.set_ylim(-0.65, len(vectors) - 0.5)
        axis.margins(x=0.14)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(measure)
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        tasks = plural(len({*table["task_a"], *table["task_b"]}), "task")
        note = f"Means of {tasks}. Short ticks: pairs of tasks, long ticks: a task with itself, under another seed."
        frame(figure, 0.35 + 0.65 * len(vectors), note=note)
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
    measured model. Optional: `metric`, the name of the target's metric; tasks of different metrics then have axes of
    their own, as a correlation and an accuracy have no common unit. Drawn: the score minus that of the bare backbone
    (`"none"`) with the same head, mean over seeds if there are several; each source a small mark, their mean a bar.
    """
    table = require(table, "task", "kind", "head", "score", numbers=("score",))
    bare = table[table["kind"] == "none"].groupby(["task", "head"])["score"].mean()
    if lacking := set(zip(table["task"], table["head"], strict=True)) - set(bare.index):
        raise ArgumentError(f"table has no row of kind 'none' for {sorted(lacking)}; gains are over it")
    index = pd.MultiIndex.from_frame(table[["task", "head"]])
    gains = table.assign(gain=table["score"].to_numpy() - bare.reindex(index).to_numpy())
    if "metric" not in gains.columns:
        gains = gains.assign(metric=metric)
    heads = list(dict.fromkeys(gains["head"]))
    groups = {name: list(dict.fromkeys(rows["task"])) for name, rows in gains.groupby("metric", sort=False)}
    sizes = [len(tasks) for tasks in groups.values()]
    with style():
        figure = new_figure(venue)
        axes = figure.subplots(len(groups), len(heads), sharey="row", squeeze=False, height_ratios=sizes)
        drawn = looks(KINDS)
        for row, (name, tasks) in zip(axes, groups.items(), strict=True):
            for axis, head in zip(row, heads, strict=True):
                rows = gains[gains["task"].isin(tasks) & (gains["head"] == head)]
                _draw_gains(axis, rows, tasks, drawn)
                axis.set_xlabel(f"{readable(str(name))} gained")
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(f"{head.capitalize()} head")
        counts = gains[gains["kind"] == "source"].groupby(["task", "head"]).size()
        seeds = f" {plural(table['seed'].nunique(), 'seed')}." if "seed" in table.columns else ""
        note = f"Small marks: single models, {counted(counts)} sources per target; bars: their means. Gained: over "
        note += f"the bare backbone with the same kind of head.{seeds}"
        handles = legend_handles({KINDS[str(kind)]: look for kind, look in drawn.items()}, line="")
        frame(figure, 0.2 + 0.3 * len(groups) + 0.34 * sum(sizes), handles=handles, note=note)
    return figure


def _draw_gains(axis: Axes, rows: pd.DataFrame, tasks: Sequence[str], drawn: Mapping[Hashable, Look]) -> None:
    """A row per task: whose vectors they are, side by side."""
    axis.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    for (place, task), (step, (kind, look)) in itertools.product(enumerate(tasks), enumerate(drawn.items())):
        values = rows.loc[(rows["task"] == task) & (rows["kind"] == kind), "gain"].to_numpy(dtype=float)
        if not values.size:
            continue
        up = place + 0.24 * (step - 1)
        marks: dict[str, Any] = {"color": look.colour, "markeredgewidth": 0, "markersize": 3.4, "alpha": 0.7}
        axis.plot(values, np.full(values.size, up), look.marker, zorder=3, **marks)
        if values.size > 1:
            axis.vlines(values.mean(), up - 0.11, up + 0.11, color=look.colour, linewidth=1.6)
    axis.set_ylim(len(tasks) - 0.45, -0.55)
    axis.set_yticks(range(len(tasks)), [str(task) for task in tasks])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _one_row_per_pair(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The table as it is drawn; `ArgumentError` unless it has one row per pair of tasks and vector."""
    table = require(table, "task_a", "task_b", "vector", value)
    check_one_row(table, "task_a", "task_b", "vector", hint="keep one layer, measure and `removed`")
    return table


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
