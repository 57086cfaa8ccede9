"""Lines stand where the table says, and the spread is only drawn where there is one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, score_against_rows

SIZES = (100, 500, 1000)
METHODS = {"HeadOnly": 0.60, "UniPELT": 0.70, "Prompt + UniPELT": 0.72}


def curves(seeds: int = 3, tasks: tuple[str, ...] = ("sst2", "rte")) -> pd.DataFrame:
    """Scores that rise by 0.02 from K to K, 0.01 apart from seed to seed."""
    rows = [
        (task, method, size, seed, score + 0.02 * step + (seed - (seeds - 1) / 2) / 100)
        for task in tasks
        for method, score in METHODS.items()
        for step, size in enumerate(SIZES)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["task", "method", "rows", "seed", "score"])


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.axison]


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_a_line_per_method_goes_through_the_means_at_each_size() -> None:
    figure = score_against_rows(curves())
    assert [axis.get_title(loc="left") for axis in panels(figure)] == ["sst2", "rte"]
    for axis in panels(figure):
        assert axis.get_xscale() == "log"
        assert len(axis.lines) == 2 * len(METHODS), "a line and its runs"
        for line, score in zip(axis.lines[::2], METHODS.values(), strict=True):
            assert np.asarray(line.get_ydata()) == pytest.approx([score, score + 0.02, score + 0.04])
            # set side by side, by less than a twentieth of K
            assert np.asarray(line.get_xdata()) == pytest.approx(SIZES, rel=0.05)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(METHODS)


def test_ticks_stand_at_the_sizes_and_say_them() -> None:
    figure = score_against_rows(curves())
    figure.draw_without_rendering()
    for axis in panels(figure):
        assert list(axis.get_xticks()) == list(SIZES)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["100", "500", "1,000"]
        assert len(axis.get_xticks(minor=True)) == 0


def test_every_run_has_a_small_mark_and_few_seeds_claim_no_deviation() -> None:
    figure = score_against_rows(curves(seeds=2))
    axis = panels(figure)[0]
    assert not [part for part in axis.collections if isinstance(part, LineCollection)]
    for dots, line, score in zip(axis.lines[1::2], axis.lines[::2], METHODS.values(), strict=True):
        found = sorted(zip(dots.get_xdata(), dots.get_ydata(), strict=True))
        steps = [
            (x, score + 0.02 * step + shift)
            for step, x in enumerate(line.get_xdata())
            for shift in (-0.005, 0.005)
        ]
        assert np.asarray(found) == pytest.approx(np.asarray(steps))
    assert "mean of 2 seeds per method and K, small dots: the seeds" in note(figure)


def test_what_one_answer_for_all_rows_scores_is_a_dotted_line() -> None:
    figure = score_against_rows(curves().assign(constant=0.51))
    for axis in panels(figure):
        [level] = [line for line in axis.lines if list(line.get_ydata()) == [0.51, 0.51]]
        assert level.get_linestyle() == "--", "a pattern of its own, not a solid line"
        assert axis.get_ylim()[0] < 0.51
    assert "Dotted: one answer for all rows" in note(figure)
    unknown = score_against_rows(curves().assign(constant=np.nan))
    assert "Dotted" not in note(unknown)
    assert len(panels(unknown)[0].lines) == 2 * len(METHODS)


def test_one_seed_claims_no_spread_and_unequal_numbers_are_stated() -> None:
    assert "no spread" in note(score_against_rows(curves(seeds=1)))
    assert "2 to 3 seeds" in note(score_against_rows(curves().drop(index=0)))


def test_a_method_without_runs_in_a_task_keeps_its_look_in_the_other() -> None:
    table = curves()
    figure = score_against_rows(table[(table["task"] == "sst2") | (table["method"] != "HeadOnly")])
    first, second = panels(figure)
    assert [line.get_color() for line in first.lines[2:]] == [line.get_color() for line in second.lines]


def test_it_leaves_table_and_pyplot_alone_and_fits_every_venue() -> None:
    table = curves()
    before = table.copy()
    for venue, width in WIDTHS.items():
        figure = score_against_rows(table, venue=venue)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        for axis in panels(figure):
            box = axis.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1
    pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == []


def test_bad_tables_are_refused() -> None:
    table = curves()
    for column in table.columns:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            score_against_rows(table.drop(columns=column))
    with pytest.raises(ArgumentError, match="no rows"):
        score_against_rows(table.head(0))
    for column in ("rows", "score"):
        with pytest.raises(ArgumentError, match=f"'{column}'.*missing or infinite"):
            score_against_rows(table.assign(**{column: np.nan}))
        with pytest.raises(ArgumentError, match=f"'{column}'.*numbers are needed"):
            score_against_rows(table.assign(**{column: "many"}))
    with pytest.raises(ArgumentError, match="holds 0; a run has at least one"):
        score_against_rows(table.assign(rows=table["rows"] - 100))
    with pytest.raises(ArgumentError, match=r"more than one row for .*'HeadOnly'.*100"):
        score_against_rows(pd.concat([table, table.head(1)]))
    many = pd.concat([table.assign(method=f"method {number}") for number in range(9)])
    with pytest.raises(ArgumentError, match="at most 8"):
        score_against_rows(many.drop_duplicates(["task", "method", "rows", "seed"]))
