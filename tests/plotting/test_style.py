"""The look: sizes, classes that can be told apart in colour and in grey, maps with an honest centre."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, centred, frame, looks, new_figure, style


def test_style_leaves_no_trace_and_ignores_the_users_settings() -> None:
    with mpl.rc_context({"font.size": 31.0, "lines.dashed_pattern": [9, 9]}):
        with style():
            assert mpl.rcParams["font.size"] == 7.0
            assert mpl.rcParams["lines.dashed_pattern"] != [9, 9]
            assert mpl.rcParams["pdf.fonttype"] == 42
        assert mpl.rcParams["font.size"] == 31.0


@pytest.mark.parametrize(("venue", "centimetres"), [("acl-column", 7.7), ("acl-page", 16.0)])
def test_widths_are_those_the_venue_prints(venue: str, centimetres: float) -> None:
    assert pytest.approx(centimetres, abs=0.02) == WIDTHS[venue] * 2.54


def test_words_are_no_formulas_and_powers_of_a_log_axis_are() -> None:
    with style():
        figure = new_figure("acl-column")
        axis = figure.subplots()
        axis.set_xscale("log")
        axis.plot([1, 1e4], [0, 1])
        axis.set_title("win $5 or $6")
        axis.set_yticks([0, 1], ["$a$", "b"])
        frame(figure, 1.5, note="a $note$")
        figure.canvas.draw()
    assert not axis.title.get_parse_math()
    assert not any(label.get_parse_math() for label in axis.get_yticklabels())
    assert [words.get_parse_math() for words in figure.texts] == [False]
    assert all(label.get_parse_math() for label in axis.get_xticklabels() if label.get_text())


def test_an_unknown_venue_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"venue='nature'.*'acl-column'"):
        new_figure("nature")


def test_without_a_venue_the_environment_says_whose_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HADAMARD_VENUE", raising=False)
    assert new_figure().get_figwidth() == WIDTHS["neurips"]
    monkeypatch.setenv("HADAMARD_VENUE", "slide")
    assert new_figure().get_figwidth() == WIDTHS["slide"]
    assert new_figure("acl-page").get_figwidth() == WIDTHS["acl-page"]
    monkeypatch.setenv("HADAMARD_VENUE", "nature")
    with pytest.raises(ArgumentError, match="venue='nature'"):
        new_figure()


def test_classes_differ_in_colour_marker_and_line_each_alone() -> None:
    drawn = looks(list("abcdefgh")).values()
    for part in ("colour", "marker", "line"):
        assert len({getattr(look, part) for look in drawn}) == 8


def test_first_two_classes_differ_in_grey() -> None:
    grey = [np.dot(to_rgb(look.colour), (0.299, 0.587, 0.114)) for look in looks("ab").values()]
    assert abs(grey[0] - grey[1]) > 0.2


def test_names_keep_their_order_and_nine_are_too_many() -> None:
    assert list(looks(["b", "a", "b"])) == ["b", "a"]
    with pytest.raises(ArgumentError, match="9 classes"):
        looks(range(9))


def test_the_diverging_map_is_white_at_its_centre_and_fair_to_both_sides() -> None:
    colours, norm = centred([0.9, 1.0, 1.4], centre=1.0)
    assert norm(1.0) == pytest.approx(0.5)
    assert (norm.vmin, norm.vmax) == (pytest.approx(0.6), pytest.approx(1.4))
    assert min(colours(norm(1.0))[:3]) > 0.9
    assert centred([1.0, 1.0], centre=1.0)[1].vmax == 2.0


def test_frame_gives_panels_their_height_whatever_legend_and_note_need() -> None:
    with style():
        short, long = new_figure("acl-column"), new_figure("acl-column")
        frame(short, 2.0)
        frame(long, 2.0, note="one two three four " * 20)
    assert short.get_figheight() == pytest.approx(2.0)
    assert long.get_figheight() > 2.4
    assert long.get_figwidth() == WIDTHS["acl-column"]


def test_a_figure_shows_itself_as_png() -> None:
    with style():
        figure = new_figure("neurips")
        frame(figure, 1.0)
    assert figure._repr_png_().startswith(b"\x89PNG")
