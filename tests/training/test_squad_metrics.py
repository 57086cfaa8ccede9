"""The official rules of SQuAD, by hand."""

from __future__ import annotations

import pytest

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.training.squad_metrics import compare, exact_match, f1, normalise


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The Broncos", "broncos"),
        ("an  apple,\ta day.", "apple day"),
        ("U.S.A.", "usa"),
        ("“quoted”", "“quoted”"),  # ASCII punctuation alone goes
        ("theatre and a-ha", "theatre and aha"),  # the hyphen goes before the article would be found
        ("The", ""),
    ],
)
def test_normalisation_by_hand(answer: str, plain: str) -> None:
    assert normalise(answer) == plain


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "score"),
    [
        ("Denver Broncos", "the denver broncos!", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),  # precision 1, recall 1/2
        ("in the year 1066", "1066", 0, 0.5),  # in, year, 1066: precision 1/3, recall 1
        ("to be or not to be", "to be to be to be", 0, 2 / 3),  # to twice and be twice of six and six
        ("red", "blue", 0, 0),
        ("", "red", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either: the same, but without a shared word
    ],
)
def test_exact_match_and_f1_by_hand(answer: str, gold: str, exact: float, score: float) -> None:
    assert exact_match(answer, gold) == exact
    assert f1(answer, gold) == pytest.approx(score)
    assert f1(gold, answer) == pytest.approx(score)


def test_the_gold_answer_that_suits_best_counts_for_each_metric() -> None:
    found = compare(["10 points", "red"], [["ten", "10 points scored", "10"], ["blue", "Red"]])
    assert found["exact-match"].tolist() == [0, 1]
    assert found["f1"].tolist() == pytest.approx([0.8, 1])


def test_answers_without_golds_are_refused() -> None:
    with pytest.raises(DataError, match="1 answers and 2 lists"):
        compare(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="each needs one or more"):
        compare(["a"], [[]])
