"""Marks stand where the table says, and every name can be read."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, score_against_parameters

METHODS = {
    "HeadOnly": ("control", 0, 0.70),
    "LayerNormTuning": ("norms", 4_608, 0.76),
    "Hadamard": ("vectors", 9_216, 0.81),
    "Hadamard, two stages": ("vectors", 9_216, 0.815),
    "IA3": ("vectors", 13_824, 0.80),
    "LoRA": ("low rank", 73_728, 0.83),
    "Pfeiffer": ("bottleneck", 226_000, 0.835),
    "ParallelAdapter": ("bottleneck", 300_000, 0.838),
    "Houlsby": ("bottleneck", 599_000, 0.84),
    "FullFineTuning": ("norms", 22_700_000, 0.835),
}


def zoo(seeds: int = 3) -> pd.DataFrame:
    """Scores 0.01 apart from seed to seed, around those of METHODS."""
    rows = [
        (method, family, seed, parameters, score + (seed - (seeds - 1) / 2) / 100)
        for method, (family, parameters, score) in METHODS.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["method", "family", "seed", "parameters", "score"])


def panel(figure: Figure) -> Axes:
    [axis] = figure.axes
    return axis


def names(figure: Figure) -> list[str]:
    return [text.get_text() for text in panel(figure).texts]


def marks(figure: Figure) -> list[Line2D]:
    return [line for line in panel(figure).lines if len(line.get_xdata()) == 1]


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_marks_are_means_at_the_count_and_bars_one_deviation() -> None:
    figure = score_against_parameters(zoo())
    assert panel(figure).get_xscale() == "log"
    expected = [(count, score) for _, count, score in METHODS.values() if count]
    found = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks(figure)]
    assert np.asarray(found) == pytest.approx(np.asarray(expected))
    bars = [bar.get_segments()[0][:, 1] for bar in panel(figure).collections]
    assert np.asarray(bars) == pytest.approx(np.asarray([(s - 0.01, s + 0.01) for _, s in expected]))
    assert "3 seeds" in note(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["norms", "vectors", "low rank", "bottleneck"], "a line is named where it is drawn"


def test_the_head_alone_is_a_line_across() -> None:
    figure = score_against_parameters(zoo())
    level = next(line for line in panel(figure).lines if line.get_linestyle() == "--")
    assert list(level.get_ydata()) == pytest.approx([0.70, 0.70])
    assert "nothing trained but the head" in note(figure)
    without = score_against_parameters(zoo().query("method != 'HeadOnly'"))
    assert "the head." not in note(without)


def test_the_name_of_a_method_is_no_formula() -> None:
    figure = score_against_parameters(zoo().replace({"method": {"LoRA": "LoRA $a$", "HeadOnly": "Head $b$"}}))
    assert {"LoRA $a$", "Head $b$"} <= set(names(figure))
    assert not any(text.get_parse_math() for text in panel(figure).texts)


def test_the_staircase_is_the_best_so_far() -> None:
    figure = score_against_parameters(zoo())
    stairs = next(line for line in panel(figure).lines if len(line.get_xdata()) > 2)
    at = dict(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True))  # the upper end of every step
    low, high = panel(figure).get_xlim()
    expected = {4_608: 0.76, 9_216: 0.815, 13_824: 0.815, 73_728: 0.83, 599_000: 0.84, 22_700_000: 0.84}
    assert {count: at[count] for count in expected} == pytest.approx(expected)
    assert (at[low], at[high]) == (pytest.approx(0.70), pytest.approx(0.84))


def words(text: Text) -> Bbox:
    """The box of a name without the line that leads to it."""
    return Text.get_window_extent(text)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("venue", ["neurips", "acl-page", "slide"])
def test_every_method_is_named_once_and_no_name_hides_another_or_a_mark(venue: str, seeds: int) -> None:
    figure = score_against_parameters(zoo(seeds), venue=venue)
    assert sorted(names(figure)) == sorted(METHODS)
    figure.draw_without_rendering()
    boxes = [words(text) for text in panel(figure).texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for line in marks(figure):
        at = panel(figure).transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
        assert not any(box.contains(*at) for box in boxes)
    for box in boxes:
        assert panel(figure).bbox.padded(1).contains(box.x0, box.y0)
        assert panel(figure).bbox.padded(1).contains(box.x1, box.y1)


def test_names_can_be_read_where_every_score_is_the_same() -> None:
    figure = score_against_parameters(zoo(1).assign(score=0.5))
    figure.draw_without_rendering()
    boxes = [words(text) for text in panel(figure).texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_name_stands_nearest_to_its_own_mark() -> None:
    figure = score_against_parameters(zoo())
    figure.draw_without_rendering()
    at = {method: (count, score) for method, (_, count, score) in METHODS.items() if count}
    named = [t for t in panel(figure).texts if isinstance(t, Annotation) and t.get_text() in at]
    pixels = {method: panel(figure).transData.transform(place) for method, place in at.items()}
    for text in named:
        box = words(text)
        gaps = {
            method: float(np.hypot(*(place - np.clip(place, (box.x0, box.y0), (box.x1, box.y1)))))
            for method, place in pixels.items()
        }
        assert min(gaps, key=lambda method: gaps[method]) == text.get_text()


def test_one_seed_claims_no_spread_and_unequal_numbers_are_stated() -> None:
    figure = score_against_parameters(zoo(1))
    assert "no spread" in note(figure)
    assert not panel(figure).collections
    assert "2 to 3 seeds" in note(score_against_parameters(zoo().drop(index=0)))


def test_it_leaves_table_and_pyplot_alone_and_fits_every_venue() -> None:
    table = zoo()
    before = table.copy()
    for venue, width in WIDTHS.items():
        figure = score_against_parameters(table, venue=venue)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        box = panel(figure).get_tightbbox()
        assert box is not None
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
    pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == []


def test_bad_tables_are_refused() -> None:
    table = zoo()
    for column in table.columns:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            score_against_parameters(table.drop(columns=column))
    with pytest.raises(ArgumentError, match="no rows"):
        score_against_parameters(table.head(0))
    for column in ("parameters", "score"):
        with pytest.raises(ArgumentError, match=f"'{column}'.*missing or infinite"):
            score_against_parameters(table.assign(**{column: np.nan}))
        with pytest.raises(ArgumentError, match=f"'{column}'.*numbers are needed"):
            score_against_parameters(table.assign(**{column: "many"}))
    with pytest.raises(ArgumentError, match=r"more than one row for .*'HeadOnly'.*0"):
        score_against_parameters(pd.concat([table, table.head(1)]))
    with pytest.raises(ArgumentError, match="differs between the rows of 'LoRA'"):
        score_against_parameters(table.assign(parameters=table["parameters"] + 5 * (table.index == 16)))
    with pytest.raises(ArgumentError, match="holds -9216"):
        score_against_parameters(table.assign(parameters=-table["parameters"]).query("method == 'Hadamard'"))
    with pytest.raises(ArgumentError, match="0 throughout"):
        score_against_parameters(table.query("method == 'HeadOnly'"))
