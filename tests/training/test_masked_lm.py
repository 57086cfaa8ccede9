"""Masked-language modelling: which tokens are chosen, and pieces of long texts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.tasks.base import in_memory
from hadamard_toolkit.training import continued_pretraining
from hadamard_toolkit.training.masked_lm import NOT_CHOSEN, MaskedText
from hadamard_toolkit.training.protocol import Protocol
from tests.training.test_continued_pretraining import TOKENIZER, WORDS, sentences
from tests.training.tiny import tiny_bert


@given(st.floats(0.05, 0.5), st.integers(0, 2**31))
def test_a_share_of_the_tokens_is_chosen_and_most_of_them_are_masked(share: float, seed: int) -> None:
    kind = MaskedText(TOKENIZER, share=share, max_length=64)
    rows = kind.encode(in_memory({"text": [" ".join(random.Random(seed).choices(WORDS[5:], k=62))] * 64}))
    torch.manual_seed(seed)
    batch = kind.collate(rows.__getitems__(range(64)))
    ids, labels = batch["input_ids"], batch["labels"]
    before = torch.tensor(rows.inputs["input_ids"])
    chosen = labels != NOT_CHOSEN
    n = 64 * 62
    assert abs(chosen.sum() / n - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert torch.equal(labels[chosen], before[chosen])
    assert torch.equal(ids[~chosen], before[~chosen])
    assert not chosen[:, [0, -1]].any()
    masked = ids[chosen] == TOKENIZER.mask_token_id
    kept = ids[chosen] == before[chosen]
    spread = 5 * (0.25 / int(chosen.sum())) ** 0.5
    assert abs(masked.float().mean() - (0.8 + 0.1 / len(WORDS))) < spread  # a random token may be [MASK]
    assert abs(kept.float().mean() - (0.1 + 0.1 / len(WORDS))) < spread


def test_masks_are_new_in_training_and_the_same_in_every_evaluation() -> None:
    kind = MaskedText(TOKENIZER, max_length=16, seed=3)
    rows = kind.encode(in_memory({"text": sentences(64, 0)}))
    one, two = (kind.collate(rows.__getitems__(range(64)))["labels"] for _ in range(2))
    assert not torch.equal(one, two)
    model = tiny_bert(head="masked-lm", vocab_size=len(WORDS))
    accelerator = continued_pretraining.open_accelerator(Protocol())
    first, second = (kind.predict(accelerator, model, kind.source(rows), 16) for _ in range(2))
    assert np.array_equal(first, second)
    assert kind.score((), first, rows)["loss"] == pytest.approx(first[:, 0].sum() / first[:, 1].sum())


def test_what_evaluations_mask_never_changes() -> None:
    """Losses of evaluations that are on record can be compared with new ones."""
    kind = MaskedText(TOKENIZER, max_length=16, seed=3)
    rows = kind.encode(in_memory({"text": sentences(12, 0)}))
    model = tiny_bert(head="masked-lm", vocab_size=len(WORDS))
    found = kind.predict(continued_pretraining.open_accelerator(Protocol()), model, kind.source(rows), 16)
    assert found[:, 1].tolist() == [0, 2, 1, 1, 3, 2, 0, 3, 3, 1, 1, 1]


def test_padding_is_never_chosen_and_a_batch_is_never_without_a_choice() -> None:
    kind = MaskedText(TOKENIZER, share=1e-9, max_length=16)
    rows = kind.encode(in_memory({"text": ["w1", "w1 w2 w3 w4"]}))
    batch = kind.collate(rows.__getitems__([0, 1]))
    assert (batch["labels"] != NOT_CHOSEN).sum() == 1
    assert (batch["input_ids"] == TOKENIZER.mask_token_id).sum() == 1
    everything = MaskedText(TOKENIZER, share=1 - 1e-9, max_length=16).collate(rows.__getitems__([0, 1]))
    assert ((everything["labels"] != NOT_CHOSEN).sum(1)).tolist() == [1, 4]


def test_long_texts_are_cut_into_pieces_without_loss() -> None:
    words = [f"w{n % 40}" for n in range(50)]
    rows = MaskedText(TOKENIZER, max_length=16).encode(in_memory({"text": [" ".join(words), "w1", ""]}))
    assert rows.lengths == [16, 16, 16, 10, 3]
    pieces = [ids[1:-1] for ids in rows.inputs["input_ids"][:4]]
    assert TOKENIZER.convert_ids_to_tokens([token for piece in pieces for token in piece]) == words
