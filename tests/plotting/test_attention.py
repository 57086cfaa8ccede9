"""Norms stand at their layer with their intervals, fits with their gains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, attention_norms, fit_comparison

TASKS, METHODS, LAYERS = ("tweets", "movies"), ("FullFineTuning", "Hadamard"), 6
FITS = {"unchanged": 0.5, "linear": 0.8, "quadratic": 0.81, "cubic": 0.805}


def norms() -> pd.DataFrame:
    rows = [
        (task, method, layer, 4.0 + layer, 4.5 + layer, 0.5 + 0.1 * place, 0.4, 0.8, 80, 2)
        for place, task in enumerate(TASKS)
        for method in METHODS
        for layer in range(LAYERS)
    ]
    columns = [
        "task",
        "method",
        "layer",
        "before",
        "after",
        "difference",
        "low",
        "high",
        "n_examples",
        "n_seeds",
    ]
    return pd.DataFrame(rows, columns=columns)


def fits() -> pd.DataFrame:
    rows = []
    for task in TASKS:
        for method in METHODS:
            for layer in range(LAYERS):
                below = np.nan
                for fit, r2 in FITS.items():
                    shift = 0.02 * TASKS.index(task)
                    rows.append((task, method, layer, fit, r2 + shift, r2 - below, -0.02, 0.02, 40, 1))
                    below = r2
    columns = [
        "task",
        "method",
        "layer",
        "fit",
        "r2",
        "gain",
        "gain_low",
        "gain_high",
        "n_examples",
        "n_seeds",
    ]
    return pd.DataFrame(rows, columns=columns)


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_norms_and_their_paired_change() -> None:
    figure = attention_norms(norms())
    assert len(figure.axes) == 4
    above, below = figure.axes[0], figure.axes[2]
    assert [axis.get_title(loc="left") for axis in figure.axes[:2]] == list(METHODS)
    dashed, solid = above.lines[0], above.lines[1]
    assert dashed.get_linestyle() == "--"
    np.testing.assert_allclose(dashed.get_ydata(), 4.0 + np.arange(LAYERS))
    np.testing.assert_allclose(solid.get_ydata(), 4.5 + np.arange(LAYERS))
    marks = [line for line in below.lines if line.get_marker() not in ("None", None)]
    np.testing.assert_allclose(marks[1].get_ydata(), 0.6)
    assert np.abs(np.asarray(marks[0].get_xdata()) - np.arange(LAYERS)).max() < 0.5, (
        "marks keep to their layer"
    )
    bar = below.collections[0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], [0.4, 0.8])
    assert "80 texts, 2 seeds" in note(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*TASKS, "before"]


def test_what_intervals_hold_for_depends_on_the_seeds() -> None:
    table, one = norms(), norms()["task"] == TASKS[0]
    several = "for other seeds and other texts"
    assert several in note(attention_norms(table))
    assert "one seed" not in note(attention_norms(table))
    mixed = table.assign(n_seeds=table["n_seeds"].where(~one, 1))
    assert f"{several} (one seed: for other texts only)" in note(attention_norms(mixed))
    assert "for other texts and these trained models" in note(attention_norms(table.assign(n_seeds=1)))


def test_methods_have_axes_of_their_own_so_that_none_is_flattened() -> None:
    table = norms()
    large = table["method"] == "FullFineTuning"
    columns = ["before", "after", "difference", "low", "high"]
    table.loc[large, columns] *= 10
    figure = attention_norms(table)
    for above, below in (figure.axes[:2], figure.axes[2:]):
        first, second = np.ptp(above.get_ylim()), np.ptp(below.get_ylim())
        assert first == pytest.approx(10 * second, rel=0.05)
    assert "Each method has its own axes" in note(figure)
    assert "own axes" not in note(attention_norms(norms().query("method == 'Hadamard'")))


def test_fits_show_their_mean_and_what_a_degree_adds() -> None:
    figure = fit_comparison(fits())
    above, below = figure.axes[0], figure.axes[2]
    means = [line for line in above.lines if line.get_marker() == "None"]
    # quadratic and cubic would lie on the linear one
    assert [line.get_ydata()[0] for line in means] == pytest.approx([0.51, 0.81])
    dots = [line for line in above.lines if line.get_marker() != "None"]
    assert sorted(dots[1].get_ydata()) == pytest.approx([0.8] * LAYERS + [0.82] * LAYERS)
    marks = [line for line in below.lines if line.get_marker() not in ("None", None)]
    assert [line.get_ydata()[0] for line in marks] == pytest.approx([0.01, 0.01, -0.005, -0.005])
    places = [line.get_xdata()[0] for line in marks]
    assert places == sorted(places), "quadratic left of cubic, tasks side by side"
    assert -0.5 < places[0] < places[-1] < 0.5
    bar = below.collections[0].get_segments()[1]
    np.testing.assert_allclose(bar, [[1 + places[0], -0.02], [1 + places[0], 0.02]])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list(FITS)
    assert "40 texts, 1 seed per task" in note(figure)
    with pytest.raises(ArgumentError, match="'spline'"):
        fit_comparison(fits().replace({"fit": {"cubic": "spline"}}))
    with pytest.raises(ArgumentError, match="no column 'r2'"):
        fit_comparison(fits().drop(columns="r2"))


@pytest.mark.parametrize("venue", WIDTHS)
def test_nothing_sticks_out(venue: str) -> None:
    for figure in (attention_norms(norms(), venue=venue), fit_comparison(fits(), venue=venue)):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        for text in [*figure.texts, *(label for axis in figure.axes for label in axis.texts)]:
            box = text.get_window_extent()
            assert -1 <= box.x0 <= box.x1 <= width + 1
            assert -1 <= box.y0 <= box.y1 <= height + 1
