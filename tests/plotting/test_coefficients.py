"""A line per kind of directions between the head alone and the unshared adapter."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import coefficient_curves
from hadamard_toolkit.studies import numbers_needed
from tests.studies.test_how_many import KS, scores_of


def test_curve_band_and_levels_are_those_of_the_table() -> None:
    table = numbers_needed(scores_of(lambda k: min(k, 3) / 3, noise=0.002, spread=0.01))
    figure = coefficient_curves(table)
    [axis] = figure.axes
    rows = table[table["kind"] == "other tasks"]
    curve = axis.lines[0]
    np.testing.assert_array_equal(curve.get_xdata(), KS)
    np.testing.assert_allclose(curve.get_ydata(), rows["share"], rtol=1e-8)
    [band] = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(rows["low"].min())
    assert heights.max() == pytest.approx(rows["high"].max())
    enough, open_ = axis.lines[1:3]
    assert list(enough.get_xdata()) == [3, 4, 8]
    assert list(open_.get_xdata()) == [1, 2]
    assert open_.get_markerfacecolor() == "white"
    across = sorted(line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1])
    assert across == pytest.approx([0, 0.98, 1], abs=1e-9)
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(k) for k in KS]
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "20 tasks, 0 left out" in words
    assert axis.get_ylabel() == "Share of the adapter's gain"


def test_every_kind_has_a_line_and_the_score_starts_at_the_head() -> None:
    scores = scores_of(lambda k: 0.5)
    other = scores[scores["kind"] == "other tasks"].assign(kind="random")
    table = numbers_needed(pd.concat([scores, other]), of="score")
    figure = coefficient_curves(table)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["other tasks", "random"]
    assert figure.axes[0].get_ylabel() == "Share of the adapter's score"
    head = table.loc[table["kind"] == "head alone", "share"].iloc[0]
    assert any(
        line.get_ydata()[0] == pytest.approx(head)
        for line in figure.axes[0].lines
        if len(line.get_xdata()) == 2
    )


def test_one_row_per_kind_and_k() -> None:
    table = numbers_needed(scores_of(lambda k: 0.5))
    with pytest.raises(ArgumentError, match="more than one row"):
        coefficient_curves(pd.concat([table, table]))
