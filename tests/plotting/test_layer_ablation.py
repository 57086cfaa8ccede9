"""What the figures of layer pruning show is what their tables say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.layer_ablation import (
    importance_by_layer,
    layers_kept_by_task,
    score_by_layers_kept,
)


def importance() -> pd.DataFrame:
    """Layer l of task t: W moved by (l + 1)(t + 1)/100, b by a tenth of it; seeds ± 10 %."""
    rows = [
        (f"task {task}", seed, layer, vector, scale * (layer + 1) * (task + 1) / 100 * (0.9 + 0.2 * seed))
        for task in range(2)
        for seed in range(2)
        for layer in range(3)
        for vector, scale in (("weight", 1.0), ("bias", 0.1), ("both", 9.0))
    ]
    return pd.DataFrame(rows, columns=["task", "seed", "layer", "vector", "rms"])


def curves() -> pd.DataFrame:
    rows = [
        (
            f"task {task}",
            seed,
            rule,
            size,
            0.5 + 0.1 * size + seed / 100 - (rule == "last") / 20,
            0.8 + seed / 100,
        )
        for task in range(2)
        for seed in range(2)
        for rule in ("last", "greedy")
        for size in range(4)
    ]
    return pd.DataFrame(rows, columns=["task", "seed", "rule", "size", "score", "full"])


def band() -> pd.DataFrame:
    rows = [
        (f"task {task}", size, 0.4 + 0.1 * size, 0.45 + 0.1 * size, 0.5 + 0.1 * size)
        for task in range(2)
        for size in (1, 2)
    ]
    return pd.DataFrame(rows, columns=["task", "size", "low", "middle", "high"])


def shares() -> pd.DataFrame:
    rows = [("a", 0, 1.0), ("a", 1, 0.5), ("a", 2, 0.0), ("b", 0, 0.5), ("b", 1, 0.5), ("b", 2, 1.0)]
    table = pd.DataFrame(rows, columns=["task", "layer", "share"])
    return table.assign(size=[2, 2, 2, 1, 1, 1], n_runs=2)


def texts(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_importance_has_a_panel_per_task_with_w_and_b_side_by_side() -> None:
    figure = importance_by_layer(importance())
    first, second = figure.axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["task 0", "task 1"]
    weight, bias = first.lines
    assert list(weight.get_ydata()) == pytest.approx([0.01, 0.02, 0.03])
    assert list(bias.get_ydata()) == pytest.approx([0.001, 0.002, 0.003])
    assert list(second.lines[0].get_ydata()) == pytest.approx([0.02, 0.04, 0.06])
    assert np.mean([weight.get_xdata(), bias.get_xdata()], axis=0) == pytest.approx([0, 1, 2])
    assert weight.get_xdata()[0] < bias.get_xdata()[0]
    spread = next(c for c in first.collections if isinstance(c, LineCollection))
    assert [np.ptp(segment[:, 1]) for segment in spread.get_segments()] == pytest.approx(
        [0.002, 0.004, 0.006]
    )
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim() == (0, pytest.approx(1.08 * 0.066))
    assert legend(figure) == ["Weight, learned W − 1", "Bias, learned b"]
    assert "2 seeds per task" in texts(figure)
    assert "no spread" in texts(importance_by_layer(importance().query("seed == 0")))


def test_importance_takes_more_tasks_than_there_are_colours() -> None:
    many = pd.concat([importance().assign(task=f"task {number}") for number in range(11)])
    panels = [axis for axis in importance_by_layer(many).axes if axis.axison]
    assert len(panels) == 11


def test_removal_curves_are_means_over_seeds_with_the_full_score_and_the_band() -> None:
    figure = score_by_layers_kept(curves(), band())
    axis = figure.axes[0]
    assert axis.get_title(loc="left") == "task 0"
    middle, full, greedy, last = axis.lines
    assert list(middle.get_ydata()) == pytest.approx([0.55, 0.65])
    assert list(full.get_ydata()) == pytest.approx([0.805, 0.805])
    assert list(greedy.get_ydata()) == pytest.approx([0.505, 0.605, 0.705, 0.805])
    assert list(last.get_ydata()) == pytest.approx([0.455, 0.555, 0.655, 0.755])
    assert list(greedy.get_xdata()) == pytest.approx([0, 1, 2, 3], abs=0.1)
    assert axis.xaxis_inverted(), "layers go from left to right"
    edge = axis.collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == pytest.approx(0.5)
    assert edge[:, 1].max() == pytest.approx(0.7)
    assert legend(figure) == ["greedy on held-out rows", "last layer first"]
    assert "2 seeds" in texts(figure)
    assert "90 %" in texts(figure)
    assert "90 %" not in texts(score_by_layers_kept(curves()))


def test_a_bar_spans_what_seeds_lose_against_their_own_full_score() -> None:
    table = curves()
    table.loc[(table["seed"] == 1) & (table["size"] == 2) & (table["rule"] == "greedy"), "score"] -= 0.04
    axis = score_by_layers_kept(table).axes[0]
    greedy, last = (part for part in axis.collections if isinstance(part, LineCollection))
    spans = np.asarray([np.asarray(segment)[:, 1] for segment in greedy.get_segments()])
    expected = [(0.505, 0.505), (0.605, 0.605), (0.665, 0.705), (0.805, 0.805)]
    assert spans == pytest.approx(np.asarray(expected)), "seeds differ by 0.01 in level, which is no loss"
    assert np.ptp([np.asarray(segment)[:, 1] for segment in last.get_segments()], axis=1).max() < 1e-9
    assert "Bars:" in texts(score_by_layers_kept(table))
    assert "Bars:" not in texts(score_by_layers_kept(table.query("seed == 0")))


def test_a_task_that_was_not_learned_is_marked_and_its_noise_is_not_magnified() -> None:
    """Task 0 ends at 0.805, one answer for all at 0.4; task 1 moves within 0.003 about one answer for all."""
    table = curves().assign(constant=0.4)
    noise = table["task"] == "task 1"
    table.loc[noise, "score"] = 0.5 + 0.001 * table.loc[noise, "size"]
    table.loc[noise, ["full", "constant"]] = 0.51, 0.5
    learned, noisy = score_by_layers_kept(table).axes
    dotted = [
        line for line in learned.lines if line.get_linestyle() == ":" or list(line.get_ydata()) == [0.4, 0.4]
    ]
    assert len(dotted) == 1
    assert [text.get_text() for text in learned.texts] == []
    assert [text.get_text() for text in noisy.texts] == ["nothing learned"]
    _, magnified = score_by_layers_kept(table.drop(columns="constant")).axes
    assert np.ptp(magnified.get_ylim()) < 0.02
    median = np.median([np.ptp(learned.get_ylim()), np.ptp(magnified.get_ylim())])
    assert np.ptp(noisy.get_ylim()) == pytest.approx(median, rel=0.01)
    above = table.assign(full=lambda rows: rows["full"] + 0.002 * (rows["task"] == "task 1"))
    assert not score_by_layers_kept(above).axes[1].texts, "0.012 above one answer for all is something"
    assert "Dotted: one answer" in texts(score_by_layers_kept(table))
    assert "Dotted" not in texts(score_by_layers_kept(curves()))


def test_no_band_is_drawn_over_sizes_without_subsets() -> None:
    figure = score_by_layers_kept(curves(), band().replace({"size": {2: 3}}))
    first, second = figure.axes[0].collections[:2]
    spans = [shape.get_paths()[0].vertices[:, 0] for shape in (first, second)]
    assert [(span.min(), span.max()) for span in spans] == [(0.75, 1.25), (2.75, 3.25)]


def test_shares_are_written_into_the_cells_with_their_mean() -> None:
    figure = layers_kept_by_task(shares())
    axis = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert [cells[layer, 0] for layer in range(3)] == ["100", "50", "0"]
    assert [cells[layer, 1] for layer in range(3)] == ["50", "50", "100"]
    assert [cells[layer, 3] for layer in range(3)] == ["75", "50", "50"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a (2)", "b (1)", "mean of tasks"]
    image = np.asarray(axis.images[0].get_array().filled(np.nan))
    assert image[0].tolist() == [1.0, 0.5, 0.0]
    assert "n = 2 per task" in texts(figure)


def test_sets_that_were_not_confirmed_are_not_drawn_as_enough() -> None:
    table = shares().assign(confirmed=lambda table: table["task"] == "a")
    figure = layers_kept_by_task(table)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a (2)", "mean of tasks"]
    assert "no smaller set was shown to be enough: b." in texts(figure)
    with pytest.raises(ArgumentError, match="False for every task"):
        layers_kept_by_task(table.assign(confirmed=False))


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ArgumentError, match="no column 'full'"):
        score_by_layers_kept(curves().drop(columns="full"))
    with pytest.raises(ArgumentError, match="nothing to draw"):
        importance_by_layer(importance()[lambda t: t["vector"] == "both"])
    with pytest.raises(ArgumentError, match=r"0\.\.1"):
        layers_kept_by_task(shares().assign(share=2.0))
