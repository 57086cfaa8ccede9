"""A column for every subset: its runs, their mean, and dots that say what is in it."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import ablation_grid
from hadamard_toolkit.studies.ablation import CELLS, cell_name

NAMES = [cell_name(*cell) for cell in CELLS]


def grid(without: str | None = None) -> pd.DataFrame:
    rows = [
        (task, seed, name, 0.6 + 0.01 * place + 0.001 * (seed - 1))
        for task in ("sst2", "movies")
        for place, name in enumerate(NAMES)
        for seed in range(3)
        if name != without
    ]
    return pd.DataFrame(rows, columns=["task", "seed", "cell", "score"])


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_the_columns_go_from_nothing_to_everything() -> None:
    assert NAMES == ["nothing", "W", "b", "norm", "W + b", "W + norm", "b + norm", "W + b + norm"]
    figure = ablation_grid(grid())
    assert len(figure.axes) == 4
    scores, matrix = figure.axes[0], figure.axes[2]
    bars = [bar.get_segments()[0] for bar in scores.collections]
    assert [bar[:, 0].mean() for bar in bars] == pytest.approx(list(range(8)))
    assert [bar[0, 1] for bar in bars] == pytest.approx([0.6 + 0.01 * place for place in range(8)])
    runs = [line for line in scores.lines if line.get_marker() == "o"]
    assert list(runs[0].get_ydata()) == pytest.approx([0.599, 0.6, 0.601])
    [floor] = [line for line in scores.lines if line.get_linestyle() == "--"]
    assert list(floor.get_ydata()) == pytest.approx([0.6, 0.6]), "the mean of the empty subset"
    filled = [line for line in matrix.lines if line.get_linestyle() == "-"]
    assert [len(line.get_ydata()) for line in filled] == [sum(cell) for cell in CELLS]
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["W", "b", "norm"]
    beside = dict(zip(["W", "b", "norm"], matrix.get_yticks(), strict=True))
    assert beside["W"] > beside["b"] > beside["norm"]
    for line, cell in zip(filled, CELLS, strict=True):
        assert list(line.get_ydata()) == [
            beside[name] for name, there in zip(beside, cell, strict=True) if there
        ]
    low, high = matrix.get_ylim()
    assert all(low < height < high for height in beside.values())
    assert "3 seeds" in note(figure)
    assert "no run" not in note(figure)


def test_a_cell_without_runs_stays_empty_and_is_counted() -> None:
    figure = ablation_grid(grid(without="b"))
    assert len(figure.axes[0].collections) == 7
    assert "2 of 16 cells have no run" in note(figure)
    with pytest.raises(ArgumentError, match="no rows"):
        ablation_grid(grid().iloc[:0])
