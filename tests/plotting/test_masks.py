"""Figures of mask overlap show the means of their cells, and no cell that is empty."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS
from hadamard_toolkit.plotting.masks import overlap_by_cell, overlap_matrices

SCORERS = ("random", "snip")


def table() -> pd.DataFrame:
    """Two pairs per cell, 0.2 apart; on the same initialisation and task no scorer is paired with itself."""
    rows = []
    for init, task in itertools.product((True, False), repeat=2):
        for a, b in (("random", "random"), ("random", "snip"), ("snip", "snip")):
            if init and task and a == b:
                continue
            mean = 0.4 * init + 0.2 * task + 0.1 * (b == "snip")
            rows += [(a, b, init, task, mean + step) for step in (-0.1, 0.1)]
    return pd.DataFrame(rows, columns=["scorer_a", "scorer_b", "same_init", "same_task", "corrected"])


def cells() -> pd.DataFrame:
    rows = []
    for scorer, (init, task) in itertools.product(SCORERS, itertools.product((True, False), repeat=2)):
        none = init and task
        mean = np.nan if none else 0.5 * init + 0.1 * (scorer == "snip")
        rows.append((scorer, init, task, 0 if none else 3, mean, mean - 0.05, mean + 0.1))
    return pd.DataFrame(
        rows, columns=["scorer", "same_init", "same_task", "pairs", "corrected", "least", "most"]
    )


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_matrices_are_the_mean_overlap_of_each_cell() -> None:
    figure = overlap_matrices(table())
    titles = [axis.get_title(loc="left").replace("\n", " ") for axis in figure.axes]
    assert titles == [
        "Same initialisation, same task",
        "Same initialisation, other task",
        "Other initialisation, same task",
        "Other initialisation, other task",
    ]
    images: list[Any] = [axis.images[0] for axis in figure.axes]
    shown = [np.ma.filled(image.get_array(), np.nan) for image in images]
    np.testing.assert_allclose(shown[0], [[np.nan, 0.7], [0.7, np.nan]])  # snip comes first
    np.testing.assert_allclose(shown[1], [[0.5, 0.5], [0.5, 0.4]])
    np.testing.assert_allclose(shown[3], [[0.1, 0.1], [0.1, 0]], atol=1e-12)
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["snip", "random"]
    assert "other initialisation, other task: 6" in note(figure)
    limits = {axis.images[0].get_clim() for axis in figure.axes}
    assert len(limits) == 1, "one colour means one overlap in all panels"
    with pytest.raises(ArgumentError, match=r"'sparsity'.*keep one"):
        overlap_matrices(pd.concat([table().assign(sparsity=0.4), table().assign(sparsity=0.8)]))


def test_three_cells_leave_one_place_empty_and_name_the_scorers_above_it() -> None:
    figure = overlap_matrices(table().query("same_init or same_task"))
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]
    below = [axis.xaxis.get_tick_params()["labelbottom"] for axis in figure.axes[:3]]
    assert below == [False, True, True], "the lowest of each column"


def test_blank_cells_are_explained() -> None:
    assert "Blank: no pair" in note(overlap_matrices(table()))
    assert "Blank" not in note(overlap_matrices(table().query("not same_init")))


def test_cells_are_marks_with_their_range_and_empty_ones_are_named() -> None:
    figure = overlap_by_cell(cells())
    [axis] = figure.axes
    lines: list[Any] = [line for line in axis.lines if line.get_marker() not in ("None", None)]
    marks = [float(line.get_xdata()[0]) for line in lines]
    assert marks == pytest.approx([0.6, 0.1, 0.1, 0.5, 0, 0])  # snip comes first
    bars: list[Any] = list(axis.collections)
    ranges = [bar.get_segments()[0][:, 0].tolist() for bar in bars]
    assert np.allclose(ranges, [[mark - 0.05, mark + 0.1] for mark in marks])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "same initialisation, same task" not in legend
    assert len(legend) == 3
    assert "No pairs: same initialisation, same task." in note(figure)
    assert "other initialisation, other task: 3)" in note(figure)
    uneven = cells()
    uneven.loc[uneven["scorer"].eq("snip") & ~uneven["same_init"], "pairs"] = 7
    assert "other initialisation, same task: 3 to 7; other" in note(overlap_by_cell(uneven))
    with pytest.raises(ArgumentError, match=r"more than one row for .*'scorer'"):
        overlap_by_cell(pd.concat([cells(), cells()]))
    with pytest.raises(ArgumentError, match="no cell with pairs"):
        overlap_by_cell(cells().assign(pairs=0))


def test_the_null_of_margins_is_drawn_hollow_below_the_first() -> None:
    found = cells().assign(margin_corrected=0.01, margin_least=-0.02, margin_most=0.03)
    figure = overlap_by_cell(found)
    [axis] = figure.axes
    lines: list[Any] = [line for line in axis.lines if line.get_marker() not in ("None", None)]
    filled = [line for line in lines if line.get_markerfacecolor() != "white"]
    hollow = [line for line in lines if line.get_markerfacecolor() == "white"]
    assert [float(line.get_xdata()[0]) for line in filled] == pytest.approx([0.6, 0.1, 0.1, 0.5, 0, 0])
    assert [float(line.get_xdata()[0]) for line in hollow] == pytest.approx([0.01] * 6)
    for one, other in zip(filled, hollow, strict=True):
        assert other.get_ydata()[0] > one.get_ydata()[0]  # the axis points down
        assert other.get_marker() == one.get_marker()
        assert other.get_markeredgecolor() == one.get_color()
    assert "hollow: given its rows and columns as well" in note(figure)
    assert "hollow" not in note(overlap_by_cell(cells()))


@pytest.mark.parametrize(("draw", "shown"), [(overlap_matrices, table()), (overlap_by_cell, cells())])
def test_every_figure(draw: Callable[..., Figure], shown: pd.DataFrame) -> None:
    for venue, width in WIDTHS.items():
        figure = draw(shown, venue=venue)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        for axis in figure.axes:
            box = axis.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1
    for column in shown.columns:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            draw(shown.drop(columns=column))
