"""What the pruner's figure draws is what its table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.pruner import pruned_layers


def table(tasks: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    """Three layers, two sites; layer 1 is pruned."""
    rows = []
    for number, task in enumerate(tasks):
        told = {"metric": "accuracy", "split": "validation", "value": 0.7, "full": 0.75, "n": 100}
        told |= {"difference": -0.05, "low": -0.1 - number / 100, "high": 0.02}
        for layer in range(3):
            for place, site in enumerate(("attention_output", "attention_norm")):
                importance = 1 + number + layer / 10 + place / 100
                rows.append(
                    {
                        "task": task,
                        "layer": layer,
                        "site": site,
                        "importance": importance,
                        "kept": layer != 1,
                        **told,
                    }
                )
    return pd.DataFrame(rows)


def test_a_bar_per_layer_and_task_hatched_where_pruned() -> None:
    drawn = table()
    vectors, norms, scores = pruned_layers(drawn).axes
    for axis, site in ((vectors, "attention_output"), (norms, "attention_norm")):
        own = drawn[drawn["site"] == site]
        heights = [bar.get_height() for bar in axis.patches]
        np.testing.assert_allclose(heights, own["importance"])
        assert [bar.get_hatch() is None for bar in axis.patches] == own["kept"].tolist()
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["a", "b"]


def test_differences_with_their_intervals() -> None:
    axis = pruned_layers(table()).axes[-1]
    ends = [line.get_segments()[0][:, 0].tolist() for line in axis.collections]
    assert ends == [[-0.1, 0.02], [-0.11, 0.02]]
    assert [text.get_text() for text in axis.texts] == ["0.750 → 0.700"] * 2
    marks = [line for line in axis.lines if line.get_marker() == "o"]
    assert [float(mark.get_xdata()[0]) for mark in marks] == [-0.05, -0.05]
    assert len({to_hex(mark.get_color()) for mark in marks}) == 2


def test_nothing_changed_is_a_mark_without_a_bar() -> None:
    drawn = table(("a",)).assign(difference=0.0, low=np.nan, high=np.nan, value=0.75)
    figure = pruned_layers(drawn)
    assert not figure.axes[-1].collections
    figure.draw_without_rendering()


def test_rows_and_split_are_said() -> None:
    figure = pruned_layers(table())
    note = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "100 validation rows" in note
    assert "head as trained" in note


def test_a_table_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no column 'importance'"):
        pruned_layers(table().drop(columns="importance"))
    twice = table()
    twice.loc[0, "value"] = 0.9
    with pytest.raises(ArgumentError, match="more than one score for a task"):
        pruned_layers(twice)
