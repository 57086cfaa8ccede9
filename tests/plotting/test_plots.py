"""What the figures show is what the tables say."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, score_by_method, training_curves, vectors_by_layer


def vectors(tasks: int = 2, layers: int = 3, seeds: int = 2) -> pd.DataFrame:
    """101 coordinates per vector: W spreads evenly over 1 ± (layer + 1) / 10, b over ± (layer + 1)."""
    spread = np.linspace(-1, 1, 101)
    rows = [
        pd.DataFrame({"task": f"task {t}", "seed": s, "layer": layer, "vector": vector, "value": values})
        for t in range(tasks)
        for s in range(seeds)
        for layer in range(layers)
        for vector, values in (("weight", 1 + spread * (layer + 1) / 10), ("bias", spread * (layer + 1)))
    ]
    return pd.concat(rows, ignore_index=True)


def curves() -> pd.DataFrame:
    """Two seeds 0.1 apart; Hadamard has a head stage of 3 epochs and an adapter stage of 2, the other has one stage."""
    rows = []
    for task in ("sst2", "stsb"):
        for seed in (0, 1):
            plan = [("Hadamard", "head", 3), ("Hadamard", "adapter", 2), ("LayerNorm", "only", 3)]
            for method, stage, epochs in plan:
                for epoch in range(1, epochs + 1):
                    value = 0.5 + epoch / 100 + seed / 10
                    rows.append((method, task, seed, stage, epoch, "validation", "accuracy", value))
    return pd.DataFrame(
        rows, columns=["method", "task", "seed", "stage", "epoch", "split", "metric", "value"]
    )


def scores(tasks: int = 3, seeds: int = 3) -> pd.DataFrame:
    rows = [
        (f"task {t}", method, seed, base + seed / 100)
        for t in range(tasks)
        for method, base in (("Head only", 0.7), ("Hadamard", 0.8))
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["task", "method", "seed", "score"])


def shown_panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.axison]


def texts(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ").replace("\u00a0", " ") for text in figure.texts)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_vectors_show_quantiles_of_the_distance_from_the_identity() -> None:
    figure = vectors_by_layer(vectors())
    weight, bias = shown_panels(figure)
    assert [axis.get_title(loc="left") for axis in (weight, bias)] == [
        "Weight, learned W − 1",
        "Bias, learned b",
    ]
    for axis, scale in ((weight, 0.1), (bias, 1.0)):
        spans = [c.get_segments()[0][:, 1] for c in axis.collections if isinstance(c, LineCollection)]
        assert len(spans) == 2 * 2 * 3  # 90 % and 50 %, two tasks, three layers
        expected = [
            share * scale * (layer + 1) for _ in range(2) for layer in range(3) for share in (0.9, 0.5)
        ]
        assert [span[1] for span in spans] == pytest.approx(expected)
        assert [span[0] for span in spans] == pytest.approx([-value for value in expected])
    assert legend(figure) == ["task 0", "task 1"]
    assert "101 coordinates in 2 seeds" in texts(figure)


def test_vectors_with_one_vector_have_one_panel() -> None:
    table = vectors().query("vector == 'bias'")
    assert [axis.get_title(loc="left") for axis in shown_panels(vectors_by_layer(table))] == [
        "Bias, learned b"
    ]


def test_layers_that_were_pruned_leave_no_gap_and_keep_their_number() -> None:
    table = vectors(layers=6).query("layer in [1, 4]")
    labels = [label.get_text() for label in shown_panels(vectors_by_layer(table))[-1].get_xticklabels()]
    assert labels == ["1", "4"]


def test_curves_are_means_over_seeds_with_stages_one_after_the_other() -> None:
    figure = training_curves(curves())
    panels = shown_panels(figure)
    assert [axis.get_title(loc="left") for axis in panels] == ["sst2", "stsb"]
    hadamard, switch = (next(line for line in panels[0].lines if len(line.get_xdata()) == n) for n in (5, 2))
    assert list(hadamard.get_xdata()) == [1, 2, 3, 4, 5]
    assert hadamard.get_ydata() == pytest.approx([0.56, 0.57, 0.58, 0.56, 0.57])
    assert list(switch.get_xdata()) == [3.5, 3.5]
    band = panels[0].collections[0].get_paths()[0].vertices
    assert (min(band[:, 1]), max(band[:, 1])) == (pytest.approx(0.51), pytest.approx(0.63))
    assert "2 seeds" in texts(figure)
    assert legend(figure) == ["Hadamard", "LayerNorm"]


def test_one_seed_is_not_called_a_mean() -> None:
    figure = training_curves(curves().query("seed == 0"))
    assert "From 1 seed." in texts(figure)
    assert "mean" not in texts(figure)


def test_curves_refuse_a_split_that_is_absent_and_mixed_metrics() -> None:
    with pytest.raises(ArgumentError, match=r"split='test'.*'validation'"):
        training_curves(curves(), split="test")
    mixed = curves()
    mixed.loc[0, "metric"] = "f1"
    with pytest.raises(ArgumentError, match=r"'accuracy', 'f1'.*'sst2'"):
        training_curves(mixed)


def test_scores_show_every_seed_the_mean_and_the_deviation() -> None:
    figure = score_by_method(scores())
    panels = shown_panels(figure)
    assert len(panels) == 3
    dots, mean, *_ = panels[0].lines
    assert list(dots.get_xdata()) == pytest.approx([0.70, 0.71, 0.72])
    assert list(mean.get_xdata()) == pytest.approx([0.71])
    reach = panels[0].collections[0].get_segments()[0][:, 0]
    assert list(reach) == pytest.approx([0.70, 0.72])  # the sample standard deviation of the three is 0.01
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Head only", "Hadamard"]
    assert "n = 3" in texts(figure)


def test_what_one_answer_for_all_rows_scores_is_a_dotted_line_per_task() -> None:
    constant = scores()["task"].map({task: 0.5 + i / 10 for i, task in enumerate(scores()["task"].unique())})
    figure = score_by_method(scores().assign(constant=constant))
    levels = [
        [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [0, 1]]
        for axis in shown_panels(figure)
    ]
    assert levels == [[pytest.approx(0.5 + i / 10)] for i in range(len(levels))]
    assert all(
        axis.get_xlim()[0] < level[0] for axis, level in zip(shown_panels(figure), levels, strict=True)
    )
    assert "Dotted: one answer for all rows" in texts(figure)
    assert "Dotted" not in texts(score_by_method(scores()))


def test_scores_of_one_seed_claim_no_spread_and_a_missing_method_is_said() -> None:
    table = scores(seeds=1).drop(index=0)
    figure = score_by_method(table)
    assert "no spread" in texts(figure)
    assert not shown_panels(figure)[0].collections
    assert [text.get_text() for text in shown_panels(figure)[0].texts] == ["not run"]


def test_unequal_numbers_of_seeds_are_stated_in_curves_and_vectors() -> None:
    table = vectors()
    fewer = table[(table["seed"] == 0) | (table["task"] == table["task"].iloc[0])]
    assert "101 coordinates in 1 to 2 seeds" in texts(vectors_by_layer(fewer))
    alone = texts(vectors_by_layer(table[table["seed"] == 0].drop(columns="seed")))
    assert "101 coordinates" in alone
    assert "seed" not in alone
    table = curves()
    fewer = table[(table["seed"] == table["seed"].iloc[0]) | (table["method"] == table["method"].iloc[0])]
    assert "1 to 2 seeds" in texts(training_curves(fewer))


def test_unequal_numbers_of_seeds_are_stated() -> None:
    assert "n = 2 to 3" in texts(score_by_method(scores().drop(index=0)))


def test_a_run_that_is_there_twice_is_refused() -> None:
    table = pd.concat([scores(), scores().head(1)])
    with pytest.raises(ArgumentError, match=r"more than one row for .*'task 0'.*'Head only'"):
        score_by_method(table)


@pytest.mark.parametrize(
    ("draw", "table"),
    [(vectors_by_layer, vectors()), (training_curves, curves()), (score_by_method, scores())],
)
def test_every_figure(draw: object, table: pd.DataFrame) -> None:
    assert callable(draw)
    before = table.copy()
    for venue, width in WIDTHS.items():
        figure = draw(table, venue=venue)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        canvas = figure.bbox
        for axis in shown_panels(figure):  # nothing is cut off, at any width
            box = axis.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1
            assert box.x1 <= canvas.x1 + 1
            assert box.y1 <= canvas.y1 + 1
    pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == []
    needed = [column for column in table.columns if not (draw is vectors_by_layer and column == "seed")]
    for column in needed:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            draw(table.drop(columns=column))
    with pytest.raises(ArgumentError, match="no rows"):
        draw(table.head(0))
    number = "score" if "score" in table else "value"
    with pytest.raises(ArgumentError, match=f"'{number}'.*missing or infinite"):
        draw(table.assign(**{number: np.nan}))
    with pytest.raises(ArgumentError, match=f"'{number}'.*numbers are needed"):
        draw(table.assign(**{number: "high"}))


def test_unknown_vectors_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"\['gate'\].*'bias', 'weight'"):
        vectors_by_layer(vectors().assign(vector="gate"))
