"""A merged model is a plain one: what is saved of it is what is loaded, or it is refused before anything changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.life import logits, shake
from tests.architectures import ARCHITECTURES, tiny_model

TARGETS = ("query", "key", "value", "attention_output", "ffn_inner", "ffn_output")
MERGED: dict[str, Adapter] = {
    "hadamard": ht.Hadamard(norm="both"),
    "heads": ht.Hadamard(placement="attention_heads"),
    "some-layers": ht.Hadamard(layers=(1,)),
    "weight": ht.Hadamard(vectors=("weight",)),
    "lora": ht.LoRA(rank=2, targets=TARGETS),
    "ia3": ht.IA3(),
    "norms": ht.LayerNormTuning(norm="both"),
    "bitfit": ht.BitFit(),
    "full": ht.FullFineTuning(),
    "head": ht.HeadOnly(),
    "stack": ht.Stack(ht.LoRA(rank=2), ht.IA3(), ht.Hadamard()),
}
SHIFTING = ("hadamard", "heads", "some-layers", "stack")
CASES = [
    (architecture, method)
    for architecture in ARCHITECTURES
    for method in MERGED
    if not (method == "bitfit" and architecture in ("t5", "llama", "modernbert"))  # they have no biases
]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_what_is_saved_is_what_was_merged(architecture: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.config.architectures = [type(model).__name__]  # save_pretrained would note it
    model.config.id2label = {0: "no", 1: "yes"}  # of unnamed labels, bart's config forgets how many they are
    model.config.label2id = {"no": 0, "yes": 1}
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attachment = ht.attach(model, MERGED[method])
    shake(attachment)
    expected = logits(model)
    if architecture == "t5" and method in SHIFTING:
        names = list(model.state_dict())
        with pytest.raises(UnsupportedError, match=r"SelfAttention.o .*has no bias.*allow_new_biases=True"):
            attachment.merge()
        assert list(model.state_dict()) == names
        assert torch.equal(logits(model), expected), "a refused merge changes nothing"
        attachment.merge(allow_new_biases=True)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    else:
        attachment.merge()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(logits(again.eval()), logits(model))
    attachment.detach()
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "modernbert"])
def test_a_switch_that_is_on_already_stays_on(architecture: str) -> None:
    model = tiny_model(architecture, attention_bias=True)
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    attachment.merge()
    assert {name for name, _ in model.named_parameters() if name.endswith(".bias")} == biases
    attachment.detach()
    assert model.config.attention_bias is True


def test_two_calls_are_one() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    first = attachment.merge()
    expected = logits(model)
    assert attachment.merge() is first
    assert torch.equal(logits(model), expected)
