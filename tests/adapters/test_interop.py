"""What stock peft reads is what we trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_model

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet", "distilbert", "bart"])
@pytest.mark.parametrize(
    "adapter",
    [
        ht.Hadamard(),
        ht.Hadamard(layers=(0, 2), norm="both"),
        ht.Hadamard(vectors=("weight",), norm=None),
        ht.Hadamard(placement="attention_heads", vectors=("bias",), norm=None),
    ],
)
def test_stock_peft_gives_the_same_logits_loaded_and_merged(
    architecture: str, adapter: ht.Hadamard, tmp_path: Path
) -> None:
    ours = tiny_model(architecture)
    attachment = ht.attach(ours, adapter)
    shake(attachment)
    expected = logits(ours)
    ht.export_peft(attachment, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    merged: PreTrainedModel | Tensor = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "adapter", "message"),
    [
        ("bert", ht.LayerNormTuning(), "LayerNormTuning has no export"),
        ("bert", ht.Hadamard(placement="attention_heads"), "columns"),
        ("bert", ht.Hadamard(vectors=()), "inserts no module"),
        ("gpt2", ht.Hadamard(), "cannot be wrapped"),
        ("albert", ht.Hadamard(), "cannot be wrapped"),
        ("llama", ht.Hadamard(), "has no bias"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    architecture: str, adapter: ht.Hadamard, message: str, tmp_path: Path
) -> None:
    attachment = ht.attach(tiny_model(architecture), adapter)
    with pytest.raises(UnsupportedError, match=message):
        ht.export_peft(attachment, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
