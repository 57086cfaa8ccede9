"""Batches drawn from a task: seeded, from the rows asked for, and remembered."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.sparsity.batches import Batches
from tests.architectures import tiny_batch, tiny_config
from tests.sparsity.tiny import attached
from tests.training.tiny import tiny_task, tiny_tokenizer


def drawn(**choices: Any) -> Batches:
    return ht.draw_batches(tiny_task(), tiny_tokenizer(), **{"examples": 20, "batch_size": 8, **choices})


def texts(batches: Batches) -> set[tuple[int, ...]]:
    return {tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"]}


def test_the_seed_draws_and_the_record_remembers() -> None:
    batches = drawn(seed=4)
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert batches.examples == 20
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}
    record = batches.record()
    assert record == drawn(seed=4).record() != drawn(seed=5).record()
    assert (record["data_seed"], record["task"], record["batches"], record["examples"]) == (4, "tiny", 3, 20)
    assert (record["batch_size"], record["max_length"]) == (8, 128)
    assert texts(drawn(seed=4)) != texts(drawn(seed=5))
    masks = ht.sparsify(attached(), scorer="snip", sparsity=0.5, batches=batches)
    assert masks.data_seed == 4
    assert masks.provenance["rows_sha256"] == record["rows_sha256"]


def test_rows_limit_the_draw_and_batches_hold_like_lengths() -> None:
    pool = range(10, 40)
    allowed = texts(drawn(rows=pool, examples=30))
    assert texts(drawn(rows=pool, seed=9)) <= allowed
    lengths = [batch["attention_mask"].sum(1) for batch in drawn()]
    assert all(a.max() <= b.min() for a, b in pairwise(lengths))


def test_bad_draws_are_refused() -> None:
    with pytest.raises(ArgumentError, match="examples=97 is not allowed; there are 96 training rows"):
        drawn(examples=97)
    with pytest.raises(ArgumentError, match="examples=31 is not allowed; there are 30"):
        drawn(examples=31, rows=range(30))
    with pytest.raises(ArgumentError, match="batch_size=0"):
        drawn(batch_size=0)
    good = {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.zeros(1)}
    with pytest.raises(DataError, match=r"batches\[1\] is empty"):
        Batches.of([good, {**good, "labels": torch.zeros(0)}])
    with pytest.raises(DataError, match=r"batches\[0\] is Tensor"):
        Batches.of([torch.ones(2)])  # type: ignore[list-item]


def test_span_tasks_are_refused() -> None:
    task = tiny_task()
    object.__setattr__(spans := replace(task), "kind", "span")
    with pytest.raises(UnsupportedError, match="kind 'span'"):
        ht.draw_batches(spans, tiny_tokenizer())


def test_batches_of_spans_can_be_scored() -> None:
    model = ht.backbone_from_config(tiny_config("bert"), head="span").eval()
    attachment = ht.attach(model, ht.Houlsby(bottleneck=4, init="normal", activation="gelu"))
    positions = torch.tensor([1, 2, 3])
    batch = {**tiny_batch(3), "start_positions": positions, "end_positions": positions + 1}
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=[batch], scope="tensor")
    assert (masks.removed, masks.provenance["examples"]) == (masks.entries // 2, 3)
