"""What the panels of several figures share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import (
    check_one_row,
    counted,
    draw_constant,
    label_below,
    label_left,
    panels_by_task,
    readable,
    require,
    seeds_text,
    stripes,
)


def test_every_other_column_has_a_stripe_of_its_own_width() -> None:
    axis = Figure().subplots()
    stripes(axis, 4)
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]  # type: ignore[attr-defined]
    assert ends == [(-0.5, 0.5), (1.5, 2.5)]


def test_a_grid_has_a_panel_per_task_and_names_its_outer_axes() -> None:
    figure, panels, height = panels_by_task(pd.Series(["a", "b", "c", "d", "e"]), None, height=1.0)
    assert len(panels) == 5
    columns = len({panel.get_position().x0 for panel in panels})
    rows = -(-5 // columns)
    assert height == pytest.approx(rows + 0.15)
    assert [axis.axison for axis in figure.axes] == [True] * 5 + [False] * (rows * columns - 5)
    label_below(panels, "below")
    label_left(panels, "left")
    assert [axis.get_ylabel() for axis in panels] == ["" if at % columns else "left" for at in range(5)]
    assert [axis.get_xlabel() for axis in panels] == ["" if at + columns < 5 else "below" for at in range(5)]
    few, _, _ = panels_by_task(pd.Series(["a", "b", "c"]), "acl-column", height=1.0, labels=["a name" * 4])
    assert len({axis.get_position().x0 for axis in few.axes}) < len(
        {axis.get_position().x0 for axis in figure.axes}
    )


def test_what_one_answer_scores_is_drawn_at_its_mean_where_it_is_known() -> None:
    axis = Figure().subplots()
    draw_constant(axis, pd.DataFrame({"score": [1.0]}))
    draw_constant(axis, pd.DataFrame({"constant": [np.nan]}))
    assert not axis.lines
    known = pd.DataFrame({"constant": [0.4, 0.6, np.nan]})
    draw_constant(axis, known)
    draw_constant(axis, known, vertical=True)
    across, up = axis.lines
    assert list(across.get_ydata()) == pytest.approx([0.5, 0.5])
    assert list(up.get_xdata()) == pytest.approx([0.5, 0.5])


def test_numbers_in_words() -> None:
    assert counted([3, 3]) == "3"
    assert counted([3, 2], "seed") == "2 to 3 seeds"
    assert counted([1], "seed") == "1 seed"
    assert counted([0], "seed") == "0 seeds"
    table = pd.DataFrame({"task": ["a", "a", "b"], "seed": [0, 1, 0]})
    assert seeds_text(table, "task") == "1 to 2 seeds"
    assert (readable("macro_f1"), readable("")) == ("Macro f1", "")


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    table = pd.DataFrame({"task": ["a", "a"], "score": [0.5, np.inf]})
    with pytest.raises(ArgumentError, match="no column 'seed'"):
        require(table, "seed")
    with pytest.raises(ArgumentError, match="table has no rows"):
        require(table.iloc[:0], "task")
    with pytest.raises(ArgumentError, match=r"table\['task'\] is of type"):
        require(table, "task", numbers=("task",))
    with pytest.raises(ArgumentError, match=r"table\['score'\] holds missing or infinite values"):
        require(table, "task", numbers=("score",))
    with pytest.raises(ArgumentError, match=r"more than one row for \{'task': 'a'\}; keep one"):
        check_one_row(table, "task", hint="keep one")
    check_one_row(table, "task", "score")
