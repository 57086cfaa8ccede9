"""Every scheme has a row: its cost on the left, its share of the unshared score on the right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import sharing_tradeoff
from hadamard_toolkit.studies.sharing import BARE, UNSHARED, sharing_by_task, sharing_summary
from tests.studies.test_sharing import scores


def note(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_rows_stand_by_cost_with_share_and_interval() -> None:
    table = scores()
    summary = sharing_summary(table)
    figure = sharing_tradeoff(summary, sharing_by_task(table))
    cost, score = figure.axes
    labels = {
        label.get_text(): place
        for label, place in zip(cost.get_yticklabels(), cost.get_yticks(), strict=True)
    }
    assert list(labels) == [UNSHARED, "mean", "another task", BARE], (
        "dearest first, as they stand from the top"
    )
    assert list(labels.values()) == [3, 2, 1, 0]
    for name, place in labels.items():
        [mark] = [line for line in score.lines if line.get_marker() == "o" and line.get_ydata()[0] == place]
        assert mark.get_xdata()[0] == pytest.approx(summary.loc[name, "share"])
        assert (mark.get_markerfacecolor() == "white") == (name in ("another task", BARE))
        [ticks] = [line for line in score.lines if line.get_marker() == "|" and line.get_ydata()[0] == place]
        assert len(ticks.get_xdata()) == 8
    bars = {bar.get_segments()[0][0, 1]: bar.get_segments()[0][:, 0] for bar in score.collections}
    np.testing.assert_allclose(bars[2], summary.loc["mean", ["share_low", "share_high"]].to_numpy(float))
    levels = sorted(line.get_xdata()[0] for line in score.lines if list(line.get_ydata()) == [0, 1])
    assert levels == pytest.approx(sorted([1, 0.98, summary.loc[BARE, "share"]]))
    assert "8 tasks, 16 runs" in note(figure)
    assert "interval for other tasks (Fieller). Solid line: unshared" in note(figure)
    assert score.get_xlabel() == "Share of the unshared score"
    own = table[table["scheme"] == UNSHARED].assign(scheme="own")
    table = pd.concat([table, own])
    figure = sharing_tradeoff(sharing_summary(table), sharing_by_task(table))
    assert figure.axes[1].get_xlabel() == "Share of the score with own vectors"


def test_one_task_has_no_intervals() -> None:
    table = scores(tasks=1)
    figure = sharing_tradeoff(sharing_summary(table), sharing_by_task(table))
    assert not figure.axes[1].collections
    with pytest.raises(ArgumentError, match="scheme='none'"):
        sharing_tradeoff(sharing_summary(table), sharing_by_task(table), floor="none")
