from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.tasks.base import in_memory
from hadamard_toolkit.training.batching import (
    Examples,
    LengthBucketedBatches,
    Padding,
    SortedBatches,
    Source,
    mix,
    tokenise,
)
from tests.training.tiny import tiny_task, tiny_tokenizer

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


def waste(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(max(lengths[row] for row in batch) - lengths[row] for batch in batches for row in batch)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 100))
def test_an_epoch_is_a_permutation_in_batches_of_the_asked_size(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    sampler = LengthBucketedBatches(lengths, size, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(len(batch) == size for batch in batches[:-1])
    assert batches == list(sampler)  # the same epoch is the same order


def test_epochs_and_seeds_give_different_orders() -> None:
    sampler = LengthBucketedBatches([5] * 100, 10, seed=0)
    orders = {str(list(sampler))}
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        orders.add(str(list(sampler)))
    assert len(orders) == 3
    assert str(list(LengthBucketedBatches([5] * 100, 10, seed=1))) not in orders


@given(st.integers(0, 1000))
def test_bucketing_wastes_less_padding_than_random_order_on_average(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.08, 400).tolist()
    sampler, ours, random = LengthBucketedBatches(lengths, 16, seed=seed), 0, 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        ours += waste(list(sampler), lengths)
        order = rng.permutation(400)
        random += waste([order[i : i + 16].tolist() for i in range(0, 400, 16)], lengths)
    assert ours < 0.5 * random


@pytest.mark.parametrize("rows", [64, 70, 5])
def test_processes_share_out_each_batch(rows: int) -> None:
    lengths = list(range(1, rows + 1))
    shards = [
        list(BatchSamplerShard(LengthBucketedBatches(lengths, 8), 2, rank, split_batches=True))
        for rank in (0, 1)
    ]
    assert len(shards[0]) == len(shards[1]) == -(-rows // 8)
    whole = list(LengthBucketedBatches(lengths, 8))
    for left, right, batch in zip(*shards, whole, strict=True):
        assert (left + right)[: len(batch)] == batch


def test_evaluation_goes_from_long_to_short_and_rows_know_their_place() -> None:
    lengths = [3, 9, 1, 9, 4]
    assert list(SortedBatches(lengths, 2)) == [[1, 3], [4, 0], [2]]


def test_tokenise_truncates_and_keeps_order() -> None:
    rows = in_memory({"text": ["it was fine", "dull", "a very very very grim day"], "label": [1, 0, 0]})
    examples = tokenise(rows, ("text",), tiny_tokenizer(), 6)
    assert examples.lengths == [5, 3, 6]
    assert examples.labels.dtype == np.int64
    assert [ids[0] for ids in examples.inputs["input_ids"]] == [1, 1, 1]
    assert [ids[-1] for ids in examples.inputs["input_ids"]] == [2, 2, 2]


def test_pairs_become_one_sequence_and_float_labels_stay_single_precision() -> None:
    rows = in_memory({"a": ["it was"], "b": ["so cold"], "label": [2.5]})
    tokenizer = tiny_tokenizer()
    examples = tokenise(rows, ("a", "b"), tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(examples.inputs["input_ids"][0])[1:-1] == [
        "it",
        "was",
        "so",
        "cold",
    ]
    assert examples.labels.dtype == np.float32


def test_a_batch_is_padded_to_its_own_longest_row() -> None:
    tokenizer = tiny_tokenizer()
    examples = tokenise(tiny_task().splits["train"], ("text",), tokenizer, 32)
    source = Source(examples, Padding(tokenizer))
    for batch in source.training(8, seed=0):
        rows = batch["row"].tolist()
        assert batch["input_ids"].shape == (len(rows), max(examples.lengths[row] for row in rows))
        assert batch["attention_mask"].sum(1).tolist() == [examples.lengths[row] for row in rows]
        assert batch["labels"].tolist() == examples.labels[rows].tolist()


def test_padding_stands_on_the_right_whatever_the_tokenizer_prefers() -> None:
    tokenizer = tiny_tokenizer()
    examples = tokenise(tiny_task().splits["train"], ("text",), tokenizer, 32)
    tokenizer.padding_side = "left"
    for batch in Source(examples, Padding(tokenizer)).evaluation(8):
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()


def test_digest_tells_rows_apart_and_ignores_labels() -> None:
    def digest(ids: list[list[int]], label: int = 0) -> str:
        return Examples({"input_ids": ids}, np.full(len(ids), label)).digest()

    assert digest([[1, 2], [3]]) != digest([[1], [2, 3]])
    assert digest([[1, 2]]) != digest([[2, 1]])
    assert digest([[1, 2]], 0) == digest([[1, 2]], 1)


def test_select_reorders_everything() -> None:
    examples = Examples({"input_ids": [[1], [2, 2], [3]]}, np.array([0, 1, 2]))
    chosen = examples.select([2, 0])
    assert chosen.inputs == {"input_ids": [[3], [1]]}
    assert chosen.labels.tolist() == [2, 0]


def test_what_a_seed_draws_never_changes() -> None:
    assert (mix(0, 0), mix(1, 2)) == (1484405855, 798405205)
    assert list(LengthBucketedBatches([3, 1, 2, 5, 4], 2, seed=1)) == [[3, 2], [4, 0], [1]]


def test_no_rows_are_no_batches() -> None:
    assert list(LengthBucketedBatches([], 4)) == []
    assert len(LengthBucketedBatches([], 4)) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="batch_size=0"):
        LengthBucketedBatches([1], 0)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no padding token"):
        Padding(tokenizer)


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    list(LengthBucketedBatches([1, 2, 3], 2))
    assert torch.equal(state, torch.get_rng_state())
