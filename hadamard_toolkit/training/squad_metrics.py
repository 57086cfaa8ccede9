"""The official rules by which SQuAD compares an answer with those that people gave (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from hadamard_toolkit.errors import DataError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same text once normalised, else 0."""
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words that both share, each counted as often as it occurs.

    0 where no word is shared, also when both are empty once normalised, as in the official script for version 1.1.
    """
    found, wanted = normalise(answer).split(), normalise(gold).split()
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


RULES: dict[str, Callable[[str, str], float]] = {"exact-match": exact_match, "f1": f1}


def compare(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """`exact-match` and `f1` [questions] in 0..1: of each answer with the gold answer that suits it best.

    The official numbers are the means of these in percent. Raises `DataError` unless each answer has its golds.
    """
    if len(answers) != len(golds) or not all(golds):
        raise DataError(
            f"{len(answers)} answers and {len(golds)} lists of gold answers do not fit; each needs one or more"
        )
    return {
        name: np.array(
            [max(rule(answer, gold) for gold in given) for answer, given in zip(answers, golds, strict=True)]
        )
        for name, rule in RULES.items()
    }
