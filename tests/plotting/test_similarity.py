"""Cells, lines and marks are where the table says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS
from hadamard_toolkit.plotting.similarity import (
    number_line,
    similarity_by_layer,
    similarity_matrices,
    transplant_gains,
)

TASKS = ("tweets", "films", "order")
VALUES = {
    ("tweets", "tweets"): 0.5,
    ("films", "films"): 0.4,
    ("order", "order"): 0.1,
    ("tweets", "films"): 0.3,
    ("films", "order"): -0.02,
}


def pairs() -> pd.DataFrame:
    """Tweets and order are not paired; b comes before W and is alike by 0.1 more."""
    rows = [
        (a, b, vector, value + 0.1 * (vector == "bias"), 0.01, 0.05 + 0.02 * (vector == "weight"))
        for vector in ("bias", "weight")
        for (a, b), value in VALUES.items()
    ]
    return pd.DataFrame(rows, columns=["task_a", "task_b", "vector", "value", "floor", "floor_high"])


def layers() -> pd.DataFrame:
    levels = {"within": 0.5, "between": 0.2, "floor": 0.0, "gap": 0.3}
    rows = [
        (vector, layer, quantity, level + layer / 100, level - 0.1, level + 0.1, 3)
        for vector in ("bias", "weight")
        for layer in (-1, 0, 1, 2)
        for quantity, level in levels.items()
    ]
    return pd.DataFrame(rows, columns=["vector", "layer", "quantity", "value", "low", "high", "tasks"])


def transplants() -> pd.DataFrame:
    """Bare: 0.6; own 0.9; two sources 0.7 and 0.8; two permuted 0.55 and 0.65; retrained 0.05 more."""
    scores = {"none": (0.6,), "own": (0.9,), "source": (0.7, 0.8), "permuted": (0.55, 0.65)}
    rows = [
        (task, kind, head, score + 0.05 * (head == "retrained" and kind != "none"))
        for task, head in itertools.product(TASKS, ("own", "retrained"))
        for kind, found in scores.items()
        for score in found
    ]
    return pd.DataFrame(rows, columns=["task", "kind", "head", "score"])


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_cells_hold_the_similarity_of_their_tasks() -> None:
    order = ["order", "films", "tweets"]
    figure = similarity_matrices(pairs(), order=order)
    weight, bias, _ = figure.axes
    assert [axis.get_title(loc="left") for axis in (weight, bias)] == ["W − 1", "b"]
    images: list[Any] = [axis.images[0] for axis in (weight, bias)]
    shown = np.ma.asarray(images[0].get_array())
    expected = [[0.1, -0.02, np.nan], [-0.02, 0.4, 0.3], [np.nan, 0.3, 0.5]]
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected)
    np.testing.assert_allclose(np.ma.filled(images[1].get_array(), np.nan), np.add(expected, 0.1))
    written = {text.get_position(): text.get_text() for text in weight.texts}
    assert written == {
        (0, 0): ".10",
        (1, 0): "−.02",
        (0, 1): "−.02",
        (1, 1): ".40",
        (2, 1): ".30",
        (1, 2): ".30",
        (2, 2): ".50",
    }
    assert [label.get_text() for label in weight.get_yticklabels()] == order
    frames: list[Any] = list(weight.patches)
    framed = {patch.get_xy() for patch in frames}
    assert framed == {(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)}
    assert "W − 1 0.07, b 0.05" in note(figure)
    with pytest.raises(ArgumentError, match="order="):
        similarity_matrices(pairs(), order=["order"])
    with pytest.raises(ArgumentError, match=r"more than one row for .*'tweets'"):
        similarity_matrices(pd.concat([pairs(), pairs().head(1)]))


def test_both_matrices_have_one_colour_scale_and_one_bar() -> None:
    weight, bias, bar = similarity_matrices(pairs()).axes
    scales = [(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in (weight, bias)]
    assert scales == [(0, pytest.approx(0.6)), (0, pytest.approx(0.6))], "0 to the largest value of both"
    assert bar.get_ylim() == (0, pytest.approx(0.6))
    assert bar.get_ylabel() == "Cosine"
    signed = pairs().assign(value=lambda table: table["value"] - 0.3)
    *_, bar = similarity_matrices(signed, measure="CKA").axes
    assert bar.get_ylim() == (pytest.approx(-0.32), pytest.approx(0.32)), "both ways from 0"
    assert bar.get_ylabel() == "CKA"


def test_the_number_line_runs_from_the_floor_over_other_tasks_to_the_task_itself() -> None:
    """W: floor 0.01, between (0.3 − 0.02)/2 = 0.14, within (0.5 + 0.4 + 0.1)/3 = 0.33; b lies 0.1 higher."""
    figure = number_line(pairs())
    [axis] = figure.axes
    heights = dict(
        zip([label.get_text() for label in axis.get_yticklabels()], axis.get_yticks(), strict=True)
    )
    assert heights["W − 1"] > heights["b"]
    texts = [(text.get_text(), *text.xy) for text in axis.texts]  # type: ignore[attr-defined]
    expected = [
        ("floor\n0.01", pytest.approx(0.01), heights["b"]),
        ("between tasks\n0.24", pytest.approx(0.24), heights["b"]),
        ("within a task (ceiling)\n0.43", pytest.approx(1.3 / 3), heights["b"]),
        ("floor\n0.01", pytest.approx(0.01), heights["W − 1"]),
        ("between tasks\n0.14", pytest.approx(0.14), heights["W − 1"]),
        ("within a task (ceiling)\n0.33", pytest.approx(1 / 3), heights["W − 1"]),
    ]
    assert sorted(texts) == sorted(expected, key=lambda row: row[0])
    ticks = {
        line.get_markersize(): sorted(line.get_xdata())
        for line in axis.lines[-5:]
        if line.get_marker() == "|"
    }
    assert ticks == {3.0: [-0.02, 0.3], 6.0: [0.1, 0.4, 0.5]}
    marks = [line.get_xdata()[0] for line in axis.lines if line.get_marker() in "os^"]
    assert sorted(marks) == pytest.approx([0.01, 0.01, 0.14, 0.24, 1 / 3, 1.3 / 3])
    assert "3 tasks" in note(figure)


def test_words_on_the_number_line_do_not_cover_each_other() -> None:
    for shift in (0.0, 0.2, 0.34):  # the last ones: between tasks next to the ceiling, and above it
        table = pairs()
        table["value"] += shift * (table["task_a"] != table["task_b"])
        for venue in WIDTHS:
            figure = number_line(table, venue=venue)
            figure.draw_without_rendering()
            boxes = [text.get_window_extent() for text in figure.axes[0].texts]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), (
                venue,
                shift,
            )


def test_a_number_line_needs_both_kinds_of_pairs() -> None:
    with pytest.raises(ArgumentError, match=r"no pair of different tasks for vector \['bias', 'weight'\]"):
        number_line(pairs().query("task_a == task_b"))
    with pytest.raises(ArgumentError, match=r"no pair of a task with itself for vector \['bias'\]"):
        number_line(pairs().query("task_a != task_b or vector == 'weight'"))
    with pytest.raises(ArgumentError, match=r"more than one row for .*'tweets'"):
        number_line(pd.concat([pairs(), pairs().head(1)]))


def test_layers_run_between_ceiling_and_floor() -> None:
    figure = similarity_by_layer(layers())
    for axis in figure.axes:
        drawn: list[Any] = [line for line in axis.lines if line.get_marker() not in ("None", None)]
        heights = [list(line.get_ydata()) for line in drawn]
        assert np.allclose(heights, [[0.5, 0.51, 0.52], [0.2, 0.21, 0.22], [0, 0.01, 0.02]])
        band = np.asarray(axis.collections[1].get_paths()[0].vertices)
        assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(0.1), pytest.approx(0.3))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["same task, other seed", "other task, other seed", "coordinates permuted"]
    assert "of 3 tasks" in note(figure)
    with pytest.raises(ArgumentError, match="one row per vector, layer"):
        similarity_by_layer(pd.concat([layers(), layers()]))


def test_gains_are_over_the_bare_backbone_with_the_same_head() -> None:
    figure = transplant_gains(transplants())
    own, retrained = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Own head", "Retrained head"]
    marks: list[Any] = [line for line in own.lines if line.get_marker() not in ("None", None)]
    first = [sorted(line.get_xdata()) for line in marks[:3]]
    assert [list(np.round(values, 9)) for values in first] == [[0.3], [0.1, 0.2], [-0.05, 0.05]]
    assert len(marks) == 9
    bars: list[Any] = list(retrained.collections)
    means = [bar.get_segments()[0][0, 0] for bar in bars]
    assert {bar.get_segments()[0][0, 1] < bar.get_segments()[0][1, 1] for bar in bars} == {True}
    assert np.allclose(means, [0.2, 0.05] * 3)
    assert [label.get_text() for label in own.get_yticklabels()] == list(TASKS)
    assert "2 sources per target" in note(figure)
    with pytest.raises(ArgumentError, match=r"kind 'none' for .*'films', 'own'"):
        transplant_gains(transplants().query("not (task == 'films' and kind == 'none' and head == 'own')"))


def test_gains_in_different_metrics_have_axes_of_their_own() -> None:
    metrics = {"tweets": "accuracy", "films": "spearman", "order": "accuracy"}
    figure = transplant_gains(transplants().assign(metric=lambda table: table["task"].map(metrics)))
    own, _, films, _ = figure.axes
    assert [label.get_text() for label in own.get_yticklabels()] == ["tweets", "order"]
    assert [label.get_text() for label in films.get_yticklabels()] == ["films"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["Accuracy gained"] * 2 + ["Spearman gained"] * 2
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Own head", "Retrained head", "", ""]
    assert len([line for line in films.lines if line.get_marker() not in ("None", None)]) == 3
    assert own.get_shared_x_axes().joined(own, films) is False
    assert own.get_position().height > 1.5 * films.get_position().height


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (similarity_matrices, pairs().drop(columns="floor")),
        (number_line, pairs().drop(columns="floor_high")),
        (similarity_by_layer, layers()),
        (transplant_gains, transplants()),
    ],
)
def test_every_figure(draw: Callable[..., Figure], table: pd.DataFrame) -> None:
    before = table.copy()
    for venue, width in WIDTHS.items():
        figure = draw(table, venue=venue)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        for axis in figure.axes:
            box = axis.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1
            assert box.y1 <= figure.bbox.y1 + 1
    pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == []
    for column in set(table.columns) - {"tasks"}:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            draw(table.drop(columns=column))
    with pytest.raises(ArgumentError, match="no rows"):
        draw(table.head(0))


def test_a_kind_that_was_not_measured_on_a_task_leaves_its_place_empty() -> None:
    figure = transplant_gains(transplants().query("not (task == 'films' and kind == 'own')"))
    own = figure.axes[0]
    marks: list[Any] = [line for line in own.lines if line.get_marker() not in ("None", None)]
    rows = [round(float(line.get_ydata()[0])) for line in marks]
    assert rows == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [label.get_text() for label in own.get_yticklabels()] == list(TASKS)
