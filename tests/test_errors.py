"""What the errors say, and that they can be caught by their public names."""

from __future__ import annotations

import pytest

from hadamard_toolkit.errors import ArgumentError, check_choice, suggestion

OPTIONS = ("macro-f1", "f1", "minilm-l6", "rank", 3, None)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("f1_macro", " Did you mean 'macro-f1'?"),  # the same words
        ("minilm", " Did you mean 'minilm-l6'?"),  # some of the words
        ("F1 score", " Did you mean 'f1'?"),  # more words
        ("r", " Did you mean 'rank'?"),  # a beginning
        ("macrof1", " Did you mean 'macro-f1'?"),  # a slip
        ("bleu", ""),
        ("", ""),
        ("_", ""),
        (None, ""),
        (3, ""),
    ],
)
def test_a_suggestion_is_an_option_that_looks_like_the_value(value: object, hint: str) -> None:
    assert suggestion(value, OPTIONS) == hint


def test_a_refused_choice_names_argument_value_options_and_the_nearest() -> None:
    with pytest.raises(ArgumentError) as refused:
        check_choice("metric", "f1_macro", ("f1", "macro-f1"))
    assert str(refused.value) == (
        "metric='f1_macro' is not allowed; choose one of 'f1', 'macro-f1'. Did you mean 'macro-f1'?"
    )
    with pytest.raises(ArgumentError, match=r"choose one of 'f1'$"):
        check_choice("metric", "bleu", ["f1"])
