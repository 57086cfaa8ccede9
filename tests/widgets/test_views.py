"""What the view says in words and HTML."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

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
