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
from scipy import stats

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


def test_no_name_is_crossed_by_the_staircase_or_a_bar() -> None:
    """The scores of the reference runs, in which two names were struck through."""
    counts = {
        "PromptTuning": 3_840,
        "LayerNormTuning": 4_608,
        "Hadamard": 9_216,
        "IA3": 13_824,
        "BitFit": 26_000,
    }
    counts |= {"LoRA": 73_728, "Pfeiffer": 226_000, "ParallelAdapter": 300_000, "Houlsby": 599_000}
    counts |= {
        "PrefixTuning": 2_570_000,
        "UniPELT": 2_900_000,
        "MAM": 4_900_000,
        "FullFineTuning": 22_700_000,
    }
    scores = [0.628, 0.765, 0.771, 0.784, 0.799, 0.807, 0.822, 0.813, 0.815, 0.744, 0.818, 0.794, 0.818]
    table = pd.DataFrame({"method": list(counts), "parameters": counts.values(), "score": scores})
    alone = pd.DataFrame({"method": ["HeadOnly"], "parameters": [0], "score": [0.676]})
    table = pd.concat([alone, table], ignore_index=True).assign(family="all", seed=0)
    for seeds in (1, 3):
        runs = [table.assign(seed=seed, score=table["score"] + seed / 100) for seed in range(seeds)]
        figure = score_against_parameters(pd.concat(runs, ignore_index=True))
        figure.draw_without_rendering()
        axis = panel(figure)
        boxes = {text.get_text(): words(text) for text in axis.texts}
        lines = [
            axis.transData.transform(line.get_xydata()) for line in axis.lines if len(line.get_xdata()) > 2
        ]
        lines += [axis.transData.transform(bar.get_segments()[0]) for bar in axis.collections]
        for (name, box), line in itertools.product(boxes.items(), lines):
            for start, end in itertools.pairwise(line):
                span = Bbox([np.minimum(start, end), np.maximum(start, end)])
                touches = box.x0 < span.x1 and span.x0 < box.x1 and box.y0 < span.y1 and span.y0 < box.y1
                assert not touches, f"{name} with {seeds} seeds"


def test_a_single_run_is_hollow_and_the_note_says_so() -> None:
    table = zoo().query("method != 'LoRA' or seed == 0")
    figure = score_against_parameters(table)
    hollow = [line for line in marks(figure) if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata()[0] for line in hollow] == [73_728]
    assert "1 to 3 seeds; hollow: one run, no spread" in note(figure)
    assert "hollow" not in note(score_against_parameters(zoo()))
    assert "n\u00a0=\u00a01" in note(score_against_parameters(zoo(1)))
    assert "another seed may change the order" in note(score_against_parameters(zoo(1)))


def test_a_method_stands_at_what_a_file_of_it_holds_where_the_table_says_so() -> None:
    table = zoo()
    stored = table["parameters"].where(table["method"] != "Houlsby", 46_080)
    figure = score_against_parameters(table.assign(stored=stored))
    assert 46_080 in [line.get_xdata()[0] for line in marks(figure)]
    assert 599_000 not in [line.get_xdata()[0] for line in marks(figure)]
    assert panel(figure).get_xlabel().startswith("Stored parameters")
    assert panel(score_against_parameters(table)).get_xlabel().startswith("Trained parameters")
    with pytest.raises(ArgumentError, match=r"'stored'.*missing or infinite"):
        score_against_parameters(table.assign(stored=np.nan))


def test_what_one_answer_for_all_rows_scores_is_a_dotted_line() -> None:
    figure = score_against_parameters(zoo().assign(constant=0.509))
    levels = [line.get_ydata()[0] for line in panel(figure).lines if list(line.get_xdata()) == [0, 1]]
    assert levels == pytest.approx([0.70, 0.509]), "the head alone, and one answer"
    assert "Dotted: one answer for all rows" in note(figure)
    assert "Dotted" not in note(score_against_parameters(zoo()))


def test_over_several_tasks_seeds_are_averaged_first_and_the_bar_is_over_tasks() -> None:
    easier = zoo(2).assign(task="easy", score=lambda rows: rows["score"] + 0.1)
    table = pd.concat([zoo(3).assign(task="hard"), easier], ignore_index=True)
    figure = score_against_parameters(table)
    at = {line.get_xdata()[0]: line.get_ydata()[0] for line in marks(figure)}
    assert at[73_728] == pytest.approx(0.83 + 0.05), "tasks count the same, however many seeds they have"
    same = sorted(count for count in at if 8_000 < count < 10_000 or 10_000 < count < 12_000)
    assert same == pytest.approx([9_216 / 1.2**0.5, 9_216 * 1.2**0.5]), (
        "bars of one size do not hide each other"
    )
    half = stats.t.ppf(0.975, 1) * 0.1 / 2
    ends = panel(figure).collections[0].get_segments()[0][:, 1]
    assert list(ends) == pytest.approx([0.76 + 0.05 - half, 0.76 + 0.05 + half])
    assert "mean of 2 tasks with 3 seeds each, bar: 95 % t interval over tasks" in note(figure)
    with pytest.raises(ArgumentError, match=r"more than one row for .*'task': 'hard'"):
        score_against_parameters(pd.concat([table, table.head(1)]))
