from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.splits import draw
from tests.training.tiny import tiny_task

SPLITS = tiny_task(train=100, test=30, test_mismatched=20).splits


def test_training_and_validation_rows_are_disjoint_and_cover_the_split() -> None:
    parts = draw(SPLITS, Protocol(), 0)
    assert len(parts["validation"].rows) == 10  # a tenth
    together = np.concatenate([parts["train"].rows, parts["validation"].rows])
    assert sorted(together) == list(range(100))
    assert parts["validation"].split == "train"
    assert list(parts["test"].rows) == list(range(30))
    assert list(parts["test_mismatched"].rows) == list(range(20))


def test_the_seed_draws_the_rows() -> None:
    protocol = Protocol(train_rows=20, validation_rows=10)
    one, again, other = (draw(SPLITS, protocol, seed) for seed in (1, 1, 2))
    assert one["train"].record() == again["train"].record()
    assert one["train"].record() != other["train"].record()


def test_few_rows_are_a_part_of_more_rows() -> None:
    few, many = (draw(SPLITS, Protocol(train_rows=k, validation_rows=30), 3) for k in (10, 50))
    assert set(few["train"].rows) < set(many["train"].rows)
    assert list(few["validation"].rows) == list(many["validation"].rows)


def test_a_validation_split_of_the_task_is_used_and_may_be_capped() -> None:
    splits = tiny_task(train=40, validation=12).splits
    parts = draw(splits, Protocol(), 0)
    assert parts["validation"].split == "validation"
    assert len(parts["validation"].rows) == 12
    assert len(parts["train"].rows) == 40
    assert len(draw(splits, Protocol(validation_rows=5), 0)["validation"].rows) == 5
    assert "validation" not in draw(splits, Protocol(validation_rows=0, select="last"), 0)
    few = Protocol(validation_rows=5)
    drawn = [tuple(draw(splits, few, seed)["validation"].rows) for seed in range(4)]
    assert len(set(drawn)) > 1, "the seed draws them"


def test_a_tenth_is_held_out_but_no_more_than_a_thousand_rows() -> None:
    rows = Dataset.from_dict({"label": range(20_000)})
    splits = DatasetDict(train=rows, test=rows.select(range(3)))
    assert len(draw(splits, Protocol(), 0)["validation"].rows) == 1000
    splits["train"] = rows.select(range(1234))
    assert len(draw(splits, Protocol(), 0)["validation"].rows) == 124  # rounded up


def test_capped_test_rows_are_the_same_for_every_seed() -> None:
    one, two = (draw(SPLITS, Protocol(test_rows=7), seed)["test"] for seed in (0, 1))
    assert one.record() == two.record()
    assert one.record()["rows"] == 7
    assert one.record()["of"] == 30


@pytest.mark.parametrize(
    "wish", [{"train_rows": 91, "validation_rows": 10}, {"validation_rows": 100}, {"train_rows": 101}]
)
def test_more_rows_than_there_are_is_refused_with_the_numbers(wish: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=r"train_rows=.* validation_rows=.* has 100"):
        draw(SPLITS, Protocol(**wish), 0)


def test_what_a_seed_draws_never_changes() -> None:
    """A run of an earlier version is restored with the rows that it was trained and scored on."""
    parts = draw(SPLITS, Protocol(train_rows=5, validation_rows=4, test_rows=4), 1)
    assert {name: part.rows.tolist() for name, part in parts.items()} == {
        "train": [5, 6, 38, 55, 99],
        "validation": [8, 16, 48, 81],
        "test": [2, 11, 21, 26],
        "test_mismatched": [2, 4, 6, 19],
    }
