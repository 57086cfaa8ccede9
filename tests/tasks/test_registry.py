"""Names of tasks."""

from __future__ import annotations

from typing import Any

import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.tasks.registry import TASKS, canonical, load_task


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sst2", "sst2"),
        ("SST-2", "sst2"),
        ("STS-B", "stsb"),
        ("glue/MRPC", "mrpc"),
        ("Embedded/Word_Order", "embedded/word-order"),
    ],
)
def test_spelling_does_not_matter(written: str, meant: str) -> None:
    assert canonical(written) == meant


def test_every_name_is_its_own_canonical_form() -> None:
    assert [canonical(name) for name in TASKS] == list(TASKS)


def test_an_unknown_task_gets_close_matches_and_the_list() -> None:
    with pytest.raises(ArgumentError) as refused:
        load_task("embedded/tweet-polarity")
    assert "name='embedded/tweet-polarity' is no known task. Did you mean 'embedded/tweets-polarity'" in str(
        refused.value
    )
    assert all(name in str(refused.value) for name in TASKS)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sst", "'sst2'"),
        ("sts", "'stsb'"),
        ("imbd", "'imdb'"),
        ("SQuAD v1.1", "'squad'"),
        ("word_order", "'embedded/word-order'"),
        ("hyperpartisan_news", "'hyperpartisan'"),
        ("polarity", "'embedded/tweets-polarity' or 'embedded/movies-polarity'"),
    ],
)
def test_a_near_miss_gets_a_suggestion(written: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=f"no known task. Did you mean {meant}"):
        load_task(written)


@pytest.mark.parametrize("name", ["", "wnli", None, 3])
def test_nonsense_is_refused(name: Any) -> None:
    with pytest.raises(ArgumentError, match="is no known task"):
        load_task(name)
