"""What the errors say, and that they can be caught by their public names."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import pytest

from hadamard_toolkit.errors import (
    ArgumentError,
    check_choice,
    check_fields,
    check_number,
    check_range,
    check_whole,
    suggestion,
)

OPTIONS = ("macro-f1", "f1", "minilm-l6", "rank", 3, None)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("f1_macro", " Did you mean 'macro-f1'?"),  # the same words
        ("minilm", " Did you mean 'minilm-l6'?"),  # some of the words
        ("F1 score", " Did you mean 'f1'?"),  # more words
        ("r", " Did you mean 'rank'?"),  # a beginning
        ("macrof1", " Did you mean 'macro-f1'?"),  # a slip
        ("mf", " Did you mean 'macro-f1'?"),  # initials
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


@pytest.mark.parametrize("value", [2, 3, 4])
def test_whole_numbers_within_their_bounds(value: int) -> None:
    check_whole("rows", value, least=2, most=4)
    check_whole("rows", value, least=2, below=5)
    check_whole("rows", value)
    check_whole("rows", None, optional=True)


@pytest.mark.parametrize("value", [True, 3.0, "3", None, math.nan])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ArgumentError) as refused:
        check_whole("rows", value, least=2, below=5)
    assert str(refused.value) == f"rows={value!r} is not allowed; it must be a whole number >= 2 and < 5"


@pytest.mark.parametrize(("value", "bounds"), [(1, {"least": 2}), (5, {"most": 4}), (5, {"below": 5})])
def test_a_whole_number_beyond_a_bound_is_refused(value: int, bounds: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=rf"rows={value} is not allowed; it must be [<>]=? \d$"):
        check_whole("rows", value, optional=True, **bounds)


@pytest.mark.parametrize("value", [0, 0.5, 1, 1.0])
def test_numbers_within_their_bounds(value: float) -> None:
    check_number("rate", value, least=0, most=1)
    check_number("rate", value, above=-0.1, below=1.1)
    check_number("rate", None, optional=True)


@pytest.mark.parametrize("value", [False, "0.5", None, math.nan, math.inf, -math.inf, 1j])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ArgumentError) as refused:
        check_number("rate", value, above=0)
    assert str(refused.value) == f"rate={value!r} is not allowed; it must be a finite number > 0"


def test_a_refusal_says_that_none_is_allowed_too() -> None:
    for check, kind in ((check_whole, "a whole number"), (check_number, "a finite number")):
        with pytest.raises(ArgumentError, match=rf"it must be {kind} >= 1 or None$"):
            check("rows", "all", least=1, optional=True)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(1, {"least": 2}), (2, {"above": 2}), (3, {"most": 2}), (2, {"below": 2}), (math.nan, {"least": 0})],
)
def test_a_number_beyond_a_bound_is_refused(value: float, bounds: dict[str, float]) -> None:
    [(_, bound)] = bounds.items()
    with pytest.raises(ArgumentError, match=rf"^rate={value} is not allowed; it must be [<>]=? {bound}$"):
        check_range("rate", value, **bounds)
    if value == value:
        with pytest.raises(ArgumentError, match=rf"^rate={value} is not allowed; it must be [<>]=? {bound}$"):
            check_number("rate", value, **bounds)


@check_fields
@dataclass(frozen=True)
class Point:
    """A place."""

    across: float
    down: float = 0.0


def test_a_checked_dataclass_names_unknown_and_missing_fields_and_is_otherwise_as_before() -> None:
    assert (Point(1.0), Point(1.0, 2.0)) == (Point(across=1.0), Point(down=2.0, across=1.0))
    assert list(inspect.signature(Point).parameters) == ["across", "down"]
    with pytest.raises(
        ArgumentError, match=r"^field of Point='acros' is not allowed.*Did you mean 'across'\?$"
    ):
        Point(acros=1.0)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"^Point needs the field 'across'$"):
        Point(down=2.0)  # type: ignore[call-arg]
