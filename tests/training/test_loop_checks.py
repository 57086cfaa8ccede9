from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from tests.training.test_loop import STILL, changed_roles, go, shortly
from tests.training.test_question_answering import span_task
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("adapter", "policy", "roles"),
    [
        (ht.HeadOnly(), "first-then-frozen", "head"),  # on cached features
        (ht.Hadamard(), "first-then-frozen", "head and norm"),
        (ht.LoRA(), "trained", "head"),
        (ht.Hadamard(), "frozen-random", "norm"),
        (ht.BitFit(), "frozen-random", "adapter"),
    ],
)
def test_what_would_train_in_half_precision_is_refused_before_any_work(
    adapter: Any, policy: str, roles: str, dtype: torch.dtype
) -> None:
    attachment = ht.attach(tiny_bert().to(dtype), adapter)
    passes: list[int] = []
    attachment.model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(
        UnsupportedError, match=f"the model's {roles} would train in {dtype}".replace("torch.", "")
    ):
        go(attachment, protocol=shortly(head=policy))
    assert not passes
    attachment.model.float()  # the way out that the error names
    assert go(attachment, protocol=shortly(head=policy)).details["fallback"] is None


@pytest.mark.parametrize(
    "adapter", [ht.LoRA(), ht.Pfeiffer(bottleneck=4), ht.PrefixTuning(length=2), ht.Hadamard(norm=None)]
)
def test_an_adapter_in_float32_trains_on_a_backbone_in_half_precision(adapter: Any) -> None:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        attachment = ht.attach(tiny_bert(**STILL).to(dtype), adapter)
        assert {p.dtype for p in attachment.parameters("adapter")} == {torch.float32}
        before = attachment.state_dict()
        results[dtype] = go(attachment, protocol=shortly(head="frozen-random"))
        assert changed_roles(attachment, before) == {"adapter"}
    one, half = (found.predictions["test"] for found in results.values())
    assert 0 < np.abs(one - half).max() < 0.1


def test_requests_that_do_not_fit_are_refused_by_name() -> None:
    attachment = ht.attach(tiny_bert(), ht.HeadOnly())
    with pytest.raises(ArgumentError, match="head='frozen-random' with HeadOnly"):
        go(attachment, protocol=shortly(head="frozen-random"))
    with pytest.raises(ArgumentError, match="2 outputs, but task 'tiny' needs 1"):
        go(attachment, tiny_task("regression"))
    with pytest.raises(ArgumentError, match="train_rows=1000"):
        go(attachment, protocol=shortly(train_rows=1000))
    with pytest.raises(ArgumentError, match="seed=-1"):
        go(attachment, seed=-1)
    with pytest.raises(ArgumentError, match="needs 2 of a span head"):
        go(attachment, span_task())


def test_more_tokens_than_the_backbone_has_positions_is_one_clear_error() -> None:
    with pytest.raises(ArgumentError, match="max_length=41 is not allowed; this backbone reaches 40 tokens"):
        go(ht.attach(tiny_bert(), ht.Hadamard()), tiny_task(), shortly(max_length=41))


def test_a_prompt_counts_among_the_positions() -> None:
    """Before the training, not at the first long batch."""
    attachment = ht.attach(tiny_bert(), ht.PromptTuning(length=4))
    with pytest.raises(
        ArgumentError, match=r"max_length=37 is not allowed; .* reaches 36 tokens with this prompt"
    ):
        go(attachment, tiny_task(), shortly(max_length=37))
    go(attachment, tiny_task(), shortly(max_length=36))


def test_a_tokenizer_of_another_model_is_refused_before_the_first_step() -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{number}" for number in range(41)])
    with pytest.raises(DataError, match=r"token 'new40' has id 60.*resize_token_embeddings\(61\) first"):
        ht.train(attachment, tiny_task(), tokenizer, ht.protocols.smoke(max_length=24))
