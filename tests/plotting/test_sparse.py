"""What the figures of sparse adapters show is what their tables say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, density_by_layer, score_against_sparsity

CONTROLS = ("shuffled", "margins", "random", "uniform", "reinitialised")


def runs(tasks: int = 2, seeds: int = 3, scorers: tuple[str, ...] = ("random", "snip")) -> pd.DataFrame:
    """Seeds 0.01 apart; the score falls by a tenth of the sparsity, with SNIP by 0.02 less."""
    rows = []
    for task in range(tasks):
        for seed in range(seeds):
            rows.append((f"task {task}", "dense", 0.0, seed, "none", 0.9 + seed / 100))
            for scorer in scorers:
                for share in (0.4, 0.8):
                    score = 0.9 - share / 10 + 0.02 * (scorer == "snip") + seed / 100
                    rows.append((f"task {task}", scorer, share, seed, "none", score))
            for control in CONTROLS:
                rows.append((f"task {task}", "snip", 0.8, seed, control, 0.7 + seed / 100))
            rows.append((f"task {task}", "snip", 0.8, seed, "dense", 0.6 + seed / 100))
    return pd.DataFrame(rows, columns=["task", "scorer", "sparsity", "seed", "control", "score"])


def masks(adapters: int = 2, layers: int = 3) -> pd.DataFrame:
    """Random keeps 200 of each layer's 2 × 500 entries; SNIP 100, 200 and 300."""
    rows = [
        (f"adapter {a}", scorer, layer, tensor, 500, kept)
        for a in range(adapters)
        for scorer in ("random", "snip")
        for layer in range(layers)
        for tensor, kept in (
            ("down", 100 if scorer == "random" else 50 + 50 * layer),
            ("up", 100 if scorer == "random" else 50 + 50 * layer),
        )
    ]
    return pd.DataFrame(rows, columns=["adapter", "scorer", "layer", "tensor", "entries", "kept"])


def shown_panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.axison]


def texts(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ").replace("\u00a0", " ") for text in figure.texts)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(axis: Axes) -> list[Any]:
    """Lines with a mark at each sparsity, not the one across."""
    return [line for line in axis.lines if line.get_marker() not in ("None", None)]


def test_scores_are_means_by_sparsity_with_the_deviation_over_seeds() -> None:
    figure = score_against_sparsity(runs())
    panels = shown_panels(figure)
    assert [axis.get_title(loc="left") for axis in panels] == ["task 0", "task 1"]
    across = panels[0].lines[0]
    assert list(across.get_ydata()) == pytest.approx([0.91, 0.91])
    snip, random, *controls = curves(panels[0])
    assert list(snip.get_ydata()) == pytest.approx([0.89, 0.85])
    assert list(random.get_ydata()) == pytest.approx([0.87, 0.83])
    assert np.mean([snip.get_xdata(), random.get_xdata()], axis=0) == pytest.approx([40, 80])
    heights = [value for line in controls for value in line.get_ydata()]
    assert heights == pytest.approx([0.85, 0.71, 0.71, 0.71, 0.71, 0.71, 0.61])  # the mask itself comes first
    bars = [c for c in panels[0].collections if isinstance(c, LineCollection)]
    lengths = [np.ptp(segment[:, 1]) for bar in bars for segment in bar.get_segments()]
    assert lengths == pytest.approx(
        [0.02] * 11
    )  # two scorers at two sparsities, seven marks on the right: each 2 × 0.01
    assert legend(figure) == [
        "snip",
        "random",
        "unpruned",
        "shuffled",
        "shuffled within margins",
        "random per tensor",
        "random overall",
        "re-initialised",
        "small dense",
    ]
    assert "n = 3" in texts(figure)


def test_without_unpruned_runs_no_line_is_drawn_across() -> None:
    figure = score_against_sparsity(runs().query("sparsity > 0 and control == 'none'"))
    panel = shown_panels(figure)[0]
    assert len(curves(panel)) == len(panel.lines) == 2
    assert "unpruned" not in legend(figure)


def test_unpruned_runs_alone_are_a_line_without_sparsities() -> None:
    panel = shown_panels(score_against_sparsity(runs().query("sparsity == 0")))[0]
    assert list(panel.get_xticks()) == []
    assert not curves(panel)
    assert list(panel.lines[0].get_ydata()) == pytest.approx([0.91, 0.91])


def test_controls_are_hollow_and_stand_behind_their_mask_in_its_colour() -> None:
    axis = shown_panels(score_against_sparsity(runs()))[0]
    snip, _, mask, *controls = curves(axis)
    assert to_hex(mask.get_markerfacecolor()) == to_hex(snip.get_color())
    assert {line.get_markerfacecolor() for line in controls} == {"white"}
    *of_snip, dense = (to_hex(line.get_markeredgecolor()) for line in controls)
    assert set(of_snip) == {to_hex(snip.get_color())} != {dense}
    assert len({line.get_marker() for line in controls}) == 6
    places = [line.get_xdata()[0] for line in (mask, *controls)]
    assert places == sorted(set(places)), "none covers another"
    assert places[0] > 85
    assert places[-1] < axis.get_xlim()[1]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["40", "80", "controls\nat 80"]
    table = runs()
    small = table["control"] == "dense"
    table.loc[small, "sparsity"] = 0.784
    axis = shown_panels(score_against_sparsity(table))[0]
    assert axis.get_xticklabels()[-1].get_text() == "controls\nat 78.4, 80", "one label, which cannot overlap"


def test_a_scorer_looks_the_same_whichever_others_there_are() -> None:
    def colour(table: pd.DataFrame) -> str:
        handles = score_against_sparsity(table).legends[0].get_lines()
        return next(to_hex(line.get_color()) for line in handles if line.get_label() == "random")

    assert colour(runs()) == colour(runs().query("scorer != 'snip'"))


def test_one_seed_claims_no_spread_and_unequal_numbers_are_stated() -> None:
    figure = score_against_sparsity(runs(seeds=1))
    assert "One seed, so no spread." in texts(figure)
    segments = [
        c.get_segments() for c in shown_panels(figure)[0].collections if isinstance(c, LineCollection)
    ]
    assert not any(segments)
    assert not shown_panels(figure)[0].patches, "no band for one unpruned run"
    lacking = runs().drop(index=runs().query("scorer == 'random' and seed == 2").index)
    assert "n = 2 to 3" in texts(score_against_sparsity(lacking))


def unequal() -> pd.DataFrame:
    """A loss of 0.020 at each sparsity; seeds differ by more, and the two sparsities have other ones."""
    of_seed = {0: 0.80, 1: 0.85, 2: 0.90}
    rows = [("dense", 0.0, seed, score) for seed, score in of_seed.items()]
    rows += [("snip", 0.4, seed, of_seed[seed] - 0.020) for seed in (1, 2)]
    rows += [("snip", 0.8, seed, of_seed[seed] - 0.020) for seed in (0, 1, 2)]
    return pd.DataFrame(rows, columns=["scorer", "sparsity", "seed", "score"]).assign(
        task="task", control="none"
    )


def test_simulated_losses_are_drawn_as_planted_where_sparsities_have_other_seeds() -> None:
    table = unequal()
    means = table.groupby("sparsity")["score"].mean()
    assert (means - means[0.0]).tolist() == pytest.approx([0, 0.005, -0.020]), (
        "what means of scores would show"
    )
    figure = score_against_sparsity(table, metric="Accuracy")
    [axis] = shown_panels(figure)
    assert axis.get_ylabel() == "Accuracy − unpruned"
    assert list(axis.lines[0].get_ydata()) == [0, 0]
    [snip] = curves(axis)
    assert list(snip.get_ydata()) == pytest.approx([-0.020, -0.020])
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["40\nn=2", "80"], "the sparsity with fewer seeds says so"
    assert not axis.texts
    assert "Differences to the unpruned run of the same seed" in texts(figure)
    assert "Left out" not in texts(figure)


def test_a_mark_with_fewer_seeds_than_others_of_its_sparsity_has_their_number() -> None:
    seeds = {0.2: {"snip": [0], "random": [0]}, 0.4: {"snip": [1, 2], "random": [0, 1, 2]}}
    seeds |= {0.8: {"snip": [0, 1, 2], "random": [0, 2]}}
    rows = [
        (scorer, share, seed, 0.80 + 0.05 * seed - 0.020)
        for share, by_scorer in seeds.items()
        for scorer, own in by_scorer.items()
        for seed in own
    ]
    pruned = pd.DataFrame(rows, columns=["scorer", "sparsity", "seed", "score"])
    table = pd.concat([unequal().query("sparsity == 0"), pruned.assign(task="task", control="none")])
    [axis] = shown_panels(score_against_sparsity(table))
    assert [label.get_text() for label in axis.get_xticklabels()] == ["20\nn=1", "40", "80"]
    assert [text.get_text() for text in axis.texts] == ["2", "2"]
    snip, random = curves(axis)
    for text, line, share in zip(axis.texts, (snip, random), (40, 80), strict=True):
        assert text.xy == pytest.approx((share, -0.020), abs=1)
        assert text.get_color() == line.get_color()


def test_equal_seeds_need_no_differences() -> None:
    figure = score_against_sparsity(runs())
    assert "Differences" not in texts(figure)
    assert not any(axis.texts for axis in shown_panels(figure))
    equal = unequal().query("seed != 0")
    assert shown_panels(score_against_sparsity(equal))[0].get_ylabel() == "Score"


def test_runs_of_seeds_without_an_unpruned_run_are_left_out_and_counted() -> None:
    lacking = unequal().query("not (sparsity == 0 and seed == 2)")
    figure = score_against_sparsity(lacking)
    assert "Left out, no unpruned run of the same seed: 2 runs." in texts(figure)
    [snip] = curves(shown_panels(figure)[0])
    assert list(snip.get_ydata()) == pytest.approx([-0.020, -0.020])
    with pytest.raises(ArgumentError, match=r"no unpruned run .* in 'task'"):
        score_against_sparsity(unequal().query("sparsity > 0"))


def test_adapters_have_their_own_panels_and_controls_may_be_absent() -> None:
    table = pd.concat([runs(1).assign(adapter=name) for name in ("LoRA", "MAM")])
    figure = score_against_sparsity(table)
    assert [axis.get_title(loc="left") for axis in shown_panels(figure)] == ["LoRA", "MAM"]
    assert "Task: task 0." in texts(figure)
    table = pd.concat([runs(2).assign(adapter=name) for name in ("LoRA", "MAM")])
    titles = [axis.get_title(loc="left") for axis in shown_panels(score_against_sparsity(table))]
    assert titles == ["LoRA, task 0", "LoRA, task 1", "MAM, task 0", "MAM, task 1"]
    plain = runs().query("control == 'none'").drop(columns="control")
    assert legend(score_against_sparsity(plain)) == ["snip", "random", "unpruned"]


def test_scores_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'sparsity'\] holds \[1.0\].*share removed"):
        score_against_sparsity(runs().replace({"sparsity": {0.8: 1.0}}))
    with pytest.raises(ArgumentError, match=r"table\['control'\]='shaken'"):
        score_against_sparsity(runs().replace({"control": {"shuffled": "shaken"}}))
    with pytest.raises(ArgumentError, match=r"more than one row for .*'task 0'.*'snip'"):
        score_against_sparsity(pd.concat([runs(), runs().query("scorer == 'snip'").head(1)]))
    with pytest.raises(ArgumentError, match="more than one row"):  # SNIP at 0 is the dense adapter once more
        score_against_sparsity(pd.concat([runs(), runs().query("sparsity == 0").assign(scorer="snip")]))


def test_density_is_the_share_kept_of_all_tensors_of_a_layer() -> None:
    figure = density_by_layer(masks())
    panels = shown_panels(figure)
    assert [axis.get_title(loc="left") for axis in panels] == ["adapter 0", "adapter 1"]
    overall = panels[0].lines[0]
    assert list(overall.get_ydata()) == pytest.approx([20, 20])
    snip, random = curves(panels[0])
    assert np.mean([snip.get_xdata(), random.get_xdata()], axis=0) == pytest.approx([0, 1, 2])
    assert list(snip.get_ydata()) == pytest.approx([10, 20, 30])
    assert list(random.get_ydata()) == pytest.approx([20, 20, 20])
    assert panels[0].get_ylim()[0] == 0
    fewer = masks().query("not (adapter == 'adapter 1' and scorer == 'snip')")
    assert [len(curves(panel)) for panel in shown_panels(density_by_layer(fewer))] == [2, 1]
    assert legend(figure) == ["snip", "random"]
    assert "seed" not in texts(figure)


def test_seeds_are_averaged_and_their_range_is_a_band() -> None:
    other = masks()
    other.loc[other["scorer"] == "snip", "kept"] = 200 - other.loc[other["scorer"] == "snip", "kept"]
    figure = density_by_layer(pd.concat([masks().assign(seed=0), other.assign(seed=1)]))
    axis = shown_panels(figure)[0]
    assert list(curves(axis)[0].get_ydata()) == pytest.approx([20, 20, 20])
    band = axis.collections[0].get_paths()[0].vertices
    assert (min(band[:, 1]), max(band[:, 1])) == (pytest.approx(10), pytest.approx(30))
    assert "2 seeds" in texts(figure)
    second = masks().assign(seed=0, adapter="other")
    unequal = density_by_layer(pd.concat([masks().assign(seed=0), other.assign(seed=1), second]))
    assert "1 to 2 seeds" in texts(unequal)
    assert "One seed" in texts(density_by_layer(masks().assign(seed=0)))


def test_masks_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'adapter 0' that keep different shares.*0\.2, 0\.4"):
        density_by_layer(pd.concat([masks().assign(seed=0), masks().assign(seed=1, kept=200)]))
    with pytest.raises(ArgumentError, match="'kept': 501"):
        density_by_layer(masks().assign(kept=501))


def test_one_entry_more_is_rounding_and_two_are_another_sparsity() -> None:
    more = masks()
    more.loc[0, "kept"] += 1
    density_by_layer(more)
    more.loc[0, "kept"] += 1
    with pytest.raises(ArgumentError, match="keep different shares"):
        density_by_layer(more)


@pytest.mark.parametrize(
    ("draw", "table", "number"),
    [(score_against_sparsity, runs(), "score"), (density_by_layer, masks(), "kept")],
)
def test_every_figure(draw: Callable[..., Figure], table: pd.DataFrame, number: str) -> None:
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
    for column in set(table.columns) - {"control", "tensor"}:
        with pytest.raises(ArgumentError, match=f"no column '{column}'"):
            draw(table.drop(columns=column))
    with pytest.raises(ArgumentError, match="no rows"):
        draw(table.head(0))
    with pytest.raises(ArgumentError, match=f"'{number}'.*missing or infinite"):
        draw(table.assign(**{number: np.nan}))
    with pytest.raises(ArgumentError, match=f"'{number}'.*numbers are needed"):
        draw(table.assign(**{number: "high"}))


def test_differences_of_all_panels_have_one_axis_and_a_lone_run_says_that_it_is_one() -> None:
    """Task a has two seeds and a loss of 0.1, task b one seed and a loss of 0.002."""
    rows = [
        ("a", "snip", 0.0, 0, 0.8),
        ("a", "snip", 0.0, 1, 0.82),
        ("a", "snip", 0.8, 0, 0.7),
        ("a", "snip", 0.8, 1, 0.72),
    ]
    rows += [("a", "snip", 0.4, 0, 0.79), ("b", "snip", 0.0, 0, 0.8), ("b", "snip", 0.8, 0, 0.798)]
    table = pd.DataFrame(rows, columns=["task", "scorer", "sparsity", "seed", "score"])
    first, second = shown_panels(score_against_sparsity(table))
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[0] < -0.1
    assert [label.get_text() for label in first.get_xticklabels()] == ["40\nn=1", "80"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["80\nn=1"]
    assert [axis.get_ylabel() for axis in (first, second)] == ["Score − unpruned", ""]
