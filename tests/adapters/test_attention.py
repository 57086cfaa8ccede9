"""Attention that is written out, so that a prefix can be put into it, returns what the original does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.attention import attention_of
from hadamard_toolkit.sites import Sites
from tests.architectures import tiny_batch, tiny_model


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "mpnet", "deberta", "deberta-v2"])
def test_as_many_things_are_returned_as_without_a_prefix(architecture: str, output_attentions: bool) -> None:
    model, returned = tiny_model(architecture), list[Any]()
    model.set_attn_implementation("eager")
    _, host = attention_of(Sites(model), 0)

    def forms() -> list[Any]:
        returned.clear()
        handle = host.register_forward_hook(lambda module, inputs, output: returned.append(output))
        with torch.no_grad():
            model(**tiny_batch(), output_attentions=output_attentions)
        handle.remove()
        [output] = returned
        return [None if part is None else part.shape[:3] for part in output]

    plain = forms()
    ht.attach(model, ht.PrefixTuning(length=3))
    assert forms() == plain
