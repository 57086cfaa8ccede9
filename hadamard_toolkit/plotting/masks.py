"""What masks have in common: between scorers, and in the four cells of shared initialisation and shared task."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.heat import colour_scale, heat
from hadamard_toolkit.plotting.panels import EDGED, check_one_row, counted, legend_handles, require
from hadamard_toolkit.plotting.sparse import SCORER_ORDER
from hadamard_toolkit.plotting.style import FAINT, Look, frame, looks, new_figure, style

HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 0.8, "markersize": 3.2}
CELLS = {
    (True, True): "same initialisation, same task",
    (True, False): "same initialisation, other task",
    (False, True): "other initialisation, same task",
    (False, False): "other initialisation, other task",
}


def overlap_matrices(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """Chance-corrected overlap of the masks of every two scorers, one panel per cell of initialisation × task.

    Table: `scorer_a`, `scorer_b`, `same_init`, `same_task`, `corrected`, one row per pair of masks of one adapter and
    sparsity (rows of `overlap_table`). Drawn: means over pairs; 1 is the same mask, 0 is chance given how many entries
    each tensor keeps. Cells without pairs are blank; a scorer with itself on the same initialisation and task would be
    one mask, unless its data differed.
    """
    table = require(table, "scorer_a", "scorer_b", "same_init", "same_task", "corrected")
    for column in ("adapter", "sparsity"):
        if column in table.columns and table[column].nunique() > 1:
            raise ArgumentError(f"table[{column!r}] holds {sorted(set(table[column]))}; keep one")
    names = _in_order({*table["scorer_a"], *table["scorer_b"]})
    cells = [cell for cell in CELLS if len(_part(table, cell))]
    matrices = {cell: _means(_part(table, cell), names) for cell in cells}
    with style():
        figure = new_figure(venue)
        columns = min(2, len(cells))
        grid = figure.subplots(-(-len(cells) // columns), columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        scale = colour_scale(np.concatenate([matrix.ravel() for matrix in matrices.values()]))
        for axis, cell in zip(panels, cells, strict=False):
            heat(axis, matrices[cell], scale, names, names, size=5.5)
            axis.set_title(CELLS[cell].capitalize().replace(", ", ",\n"), fontsize=6.5)
        for unused in panels[len(cells) :]:
            unused.set_axis_off()
        if len(cells) < len(panels):  # the column that ends above the last row shows its own names
            panels[len(cells) - columns].tick_params(labelbottom=True)
        side = (figure.get_figwidth() - 0.9) / columns
        counts = "; ".join(f"{CELLS[cell]}: {len(_part(table, cell))}" for cell in cells)
        blank = any(np.isnan(matrix).any() for matrix in matrices.values())
        note = (
            "Chance-corrected Jaccard, (J − J₀)/(1 − J₀), J₀ given the density of each tensor: 1 is the same mask, 0 "
            f"is chance. Means over pairs of masks: {counts}."
            + " Blank: no pair; a scorer that reads no data has one mask per initialisation and task."
            * blank
        )
        frame(figure, (0.75 * side + 0.3) * len(grid) + 0.5, note=note)
    return figure


def overlap_by_cell(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """The shared-seed confound: overlap of one scorer's masks by whether initialisation and task are the same.

    Table: `scorer`, `same_init`, `same_task`, `pairs`, `corrected`, `least`, `most`, one row per scorer and cell (one
    adapter and sparsity of `overlap_cells`). Drawn: mean (mark) and range (line); cells without pairs are left out and
    named in the note. What overlaps across tasks on the same initialisation, and not on another, is the initialisation.
    Optional `margin_corrected`, `margin_least`, `margin_most`: the same given the rows and columns of each tensor as
    well, hollow and below. Where only the filled mark is off zero, the masks share units and coordinates, not weights.
    """
    table = require(
        table, "scorer", "same_init", "same_task", "pairs", "corrected", "least", "most", numbers=("pairs",)
    )
    check_one_row(table, "scorer", "same_init", "same_task", hint="keep one adapter and sparsity")
    names = _in_order(set(table["scorer"]))
    known = table[(table["pairs"] > 0) & table["corrected"].notna()]
    if known.empty:
        raise ArgumentError("table has no cell with pairs; there is nothing to draw")
    shown = [cell for cell in CELLS if len(_part(known, cell))]
    nulls: list[tuple[str, float, dict[str, Any]]] = [("", 0.0, {"markersize": 4.6, **EDGED})]
    if "margin_corrected" in table.columns:
        nulls = [("", -0.04, {"markersize": 4.2, **EDGED}), ("margin_", 0.05, {})]
    drawn: dict[tuple[bool, bool], Look] = dict(zip(CELLS, looks(CELLS).values(), strict=True))
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        axis.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
        for (place, name), (step, cell) in itertools.product(enumerate(names), enumerate(shown)):
            rows = _part(known[known["scorer"] == name], cell)
            at = place + 0.2 * (step - (len(shown) - 1) / 2)
            colour, marker = drawn[cell].colour, drawn[cell].marker
            for null, below, mark in nulls:
                columns = [f"{null}{name}" for name in ("least", "most", "corrected")]
                for least, most, mean in rows[columns].to_numpy(dtype=float):
                    axis.hlines(at + below, least, most, color=colour, linewidth=1.0, zorder=2)
                    axis.plot(
                        mean,
                        at + below,
                        marker,
                        color=colour,
                        zorder=3,
                        **(mark or HOLLOW | {"markeredgecolor": colour}),
                    )
        axis.set_ylim(len(names) - 0.45, -0.55)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("Overlap beyond chance, (J − J₀)/(1 − J₀)")
        axis.grid(axis="x")
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        missing = [CELLS[cell] for cell in CELLS if cell not in shown]
        counts = "; ".join(f"{CELLS[cell]}: {counted(_part(known, cell)['pairs'])}" for cell in shown)
        note = f"Mark: mean, line: range over the pairs of masks of one scorer ({counts})."
        if len(nulls) > 1:
            note += " Filled: given the density of each tensor; hollow: given its rows and columns as well."
        note += f" No pairs: {'; '.join(missing)}." if missing else ""
        handles = legend_handles({CELLS[cell]: drawn[cell] for cell in shown}, line="-")
        frame(figure, 0.45 + (0.27 if len(nulls) == 1 else 0.4) * len(names), handles=handles, note=note)
    return figure


def _in_order(scorers: set[str]) -> list[str]:
    """The library's scorers first, in their usual order, then others."""
    return [*(s for s in SCORER_ORDER if s in scorers), *sorted(scorers - set(SCORER_ORDER))]


def _part(table: pd.DataFrame, cell: tuple[bool, bool]) -> pd.DataFrame:
    return table[(table["same_init"] == cell[0]) & (table["same_task"] == cell[1])]


def _means(part: pd.DataFrame, names: list[str]) -> np.ndarray:
    mirrored = part.rename(columns={"scorer_a": "scorer_b", "scorer_b": "scorer_a"})
    other = mirrored[mirrored["scorer_a"] != mirrored["scorer_b"]]
    means = pd.concat([part, other]).groupby(["scorer_a", "scorer_b"])["corrected"].mean().unstack("scorer_b")
    return means.reindex(index=names, columns=names).to_numpy(dtype=float)
