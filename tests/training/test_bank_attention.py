from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hadamard_toolkit as ht
from hadamard_toolkit.training.bank_attention import folded_attention
from hadamard_toolkit.training.bank_state import Forward
from tests.architectures import tiny_batch, tiny_config


def test_a_bank_that_ends_leaves_the_attention_of_another_as_it_is() -> None:
    model = ht.backbone_from_config(tiny_config("bert"))
    forward, values = Forward(model, dict(model.named_parameters())), dict(model.named_parameters())
    values = {name: value.detach().expand(2, *value.shape) for name, value in values.items()}
    inputs = {name: value.expand(2, *value.shape) for name, value in tiny_batch().items()}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.no_grad(), folded_attention():  # one bank at work, in whose time two others begin and end
        folded = ALL_ATTENTION_FUNCTIONS["sdpa"]
        first = forward(values, inputs)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is folded is not plain
        assert torch.equal(forward(values, inputs), first)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def test_a_single_run_has_the_attention_that_it_always_has() -> None:
    model = ht.backbone_from_config(tiny_config("bert")).eval()
    with torch.no_grad():
        expected = model(**tiny_batch()).logits
        with folded_attention():
            assert torch.equal(model(**tiny_batch()).logits, expected)
