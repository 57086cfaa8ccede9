"""What the view says in words and HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.evaluation import Score


def test_scores_in_words() -> None:
    score = Score("accuracy", 0.71875, 0.8125, -0.2263, 0.0498, n=32, changed=5, gained=1, lost=4, loss=0.6)
    assert views.difference(score) == "−0.0938 [−0.2263, +0.0498]"
    assert views.flipped(score) == "5 of 32 (+1 / −4)"
    nothing = replace(score, value=score.full, low=float("nan"), high=float("nan"))
    assert views.difference(nothing) == "no prediction changed"
    assert views.flipped(replace(score, metric="spearman")) == "— of 32"


def test_text_of_examples_is_escaped() -> None:
    table = pd.DataFrame([[0, "<script>alert(1)</script>", "a", "b", "a", 0.5]],
                         columns=["row", "text", "label", "before", "after", "change"])  # fmt: skip
    html = views.flips({"t": table}, {"t": 1})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_bar_is_as_long_as_its_value_beside_the_largest() -> None:
    assert "width:25%" in views._bar("W", 0.5, 2.0)
    assert "width:100%" in views._bar("W", 2.0, 2.0)
    assert "width:0%" in views._bar("W", 0.0, 0.0)


def test_numbers_in_words() -> None:
    assert [views.number(value) for value in (0.12345, -1.0, float("nan"))] == ["0.1235", "−1.0000", "—"]
    assert [views.number(value, sign=True) for value in (0.5, -0.5)] == ["+0.5000", "−0.5000"]
    values = (0.0, 0.0123456, 0.5, 12.0, 100.0, 1234.6, float("nan"))
    assert [views.short(value) for value in values] == ["0", "0.0123", "0.500", "12.0", "100", "1235", "—"]


def test_bars_are_named_by_what_they_measure() -> None:
    nothing = float("nan")
    row = {
        "site": "query",
        "weight": nothing,
        "bias": nothing,
        "importance": 2.0,
        "without": nothing,
        "density": 1,
    }
    largest = {"weight": 4.0, "bias": 2.0, "importance": 8.0}

    def bars(**changes: object) -> list[tuple[str, str, str]]:
        html = views.evidence([{**row, **changes}], largest, kept=True)
        pattern = r"<span>([^<]+)</span><div.*?width:(\d+%).*?</div></div><span>(.*?)</span>"
        return re.findall(pattern, html)

    assert bars() == [("norm", "25%", "2.00")], "all of its parameters, where there are no vectors"
    assert bars(weight=1.0, bias=0.5) == [("|W − 1|", "25%", "1.00"), ("|b|", "25%", "0.500")]
    assert bars(weight=1.0) == [("|W − 1|", "25%", "1.00")]
    assert bars(site="ffn_norm", weight=1.0, bias=2.0) == [
        ("|Δ gain|", "25%", "1.00"), ("|Δ bias|", "100%", "2.00"),
    ]  # fmt: skip
    assert bars(density=0.5)[1:] == [("density", "50%", "0.500")]
    html = views.evidence([{**row, "without": -0.25}], largest, kept=False)
    assert "<span>without</span><span></span><span>−0.2500</span>" in html
    assert html.startswith('<div class="bars off">')
    assert views.evidence([row], largest, kept=True).startswith('<div class="bars">')


def test_bars_of_several_tasks_are_headed_by_the_task() -> None:
    rows = [
        {"task": task, "site": "query", "weight": 1.0, "bias": 1.0, "without": float("nan"), "density": 1}
        for task in ("a<b", "c")
    ]
    largest = {"weight": 1.0, "bias": 1.0}
    heads = re.findall(
        r'<span style="grid-column: 1 / 4">(.*?)</span>', views.evidence(rows, largest, kept=True)
    )
    assert heads == ["a&lt;b", "c"]
    assert "grid-column" not in views.evidence(rows[:1], largest, kept=True)


def test_scores_that_are_not_up_to_date_stand_out() -> None:
    score = Score("accuracy", 0.5, 0.75, -0.5, 0.1, n=8, changed=3, gained=1, lost=2, loss=0.6)
    rows = [
        {"task": "a", "score": score, "status": "stale: preview on 8 rows"},
        {
            "task": "b",
            "score": score,
            "status": "up to date, test rows",
            "retrained": score,
            "retrained_as": "run 1f",
        },
    ]
    html = views.numbers(rows, "0-<2")
    assert "Kept: <b>0-&lt;2</b>" in html
    assert re.findall(r"<th(?: [^>]*)?>(.*?)</th>", html) == [
        "Task", "Metric", "Unpruned", "Pruned", "Difference, 95 % interval", "Flipped rows", "State of the numbers",
    ]  # fmt: skip
    marks = re.findall(r"<tr( class=\"stale\")?><td", html)
    assert [bool(mark) for mark in marks] == [True, False, False]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for row in html.split("<tr")[2:]]
    assert [row[0] for row in cells] == ["a", "b", "b, retrained"]
    assert cells[2][1:4] == ["accuracy", "0.7500", "0.5000"]
    assert cells[2][-1] == "run 1f"
    words = re.findall(r'<td class="words" data-name="(.*?)"', html.split("<tr")[2])
    assert words == ["Task", "Metric", "State of the numbers"], "these are aligned to the left"


def test_costs_in_words() -> None:
    full = pd.Series({"trained": 4000, "stored": 3000, "multiply_adds": 2000})
    kept = pd.Series(
        {
            "trained": 1000,
            "stored": 600,
            "of_full": 0.25,
            "multiply_adds": 500,
            "backbone": 40_000,
            "merges": True,
        }
    )
    text = re.sub("<.*?>", "", views.costs(kept, full))
    assert text == (
        "Trained 1,000 of 4,000 parameters (25 %), stored 600 of 3,000, head left out. "
        "Inference, beside the backbone: 500 multiply-adds per token "
        "(1.25 % of its layers' matrices; 2,000 unpruned); nothing after merge()."
    )
    assert "; it cannot be merged." in views.costs(pd.Series({**kept, "merges": False}), full)


def test_changed_examples_are_counted_in_words() -> None:
    rows = [[0, "text", "good", "bad", "good", 0.25]]
    table = pd.DataFrame(rows, columns=["row", "text", "label", "before", "after", "change"])
    cases = [
        (table, 1, "t: 1 predictions flipped"),
        (table, 3, "t: 3 predictions flipped, the 1 surest shown"),
        (table, None, "t: the 1 largest changes"),
        (table[:0], None, "t: no change"),
        (table[:0], 0, "t: 0 predictions flipped"),
    ]
    for shown, total, said in cases:
        html = views.flips({"t": shown}, {"t": total})
        assert f"<p>{said}</p>" in html
        assert re.findall(r"<td.*?>(.*?)</td>", html) == (
            ["0", "text", "good", "bad", "good", "+0.2500"] if len(shown) else []
        )
        assert ("<table" in html) == bool(len(shown))


def test_code_has_as_many_rows_as_lines_up_to_sixteen() -> None:
    assert 'rows="3"' in views.code("a\nb\nc")
    assert 'rows="16"' in views.code("a\n" * 30)
    assert "x &lt; 1" in views.code("x < 1")


def test_messages_and_bars_of_progress() -> None:
    assert views.message("") == ""
    assert views.message("a < b") == '<p role="status">a &lt; b</p>'
    assert views.message("no", error=True) == '<p class="error" role="alert"><b>Failed:</b> no</p>'
    assert 'value="0.250" max="1"' in views.progress("half", 0.25)
    assert "value=" not in views.progress("begun", None)
    assert views.progress("a<b", None).count("a&lt;b") == 2, "shown and announced"


def test_folders_below_the_working_folder_are_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert views.near(Path("figures")) == views.near(tmp_path / "here" / "figures") == "figures"
    assert views.near(tmp_path / "there") == str(tmp_path / "there")
