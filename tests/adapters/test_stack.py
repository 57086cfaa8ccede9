"""Stacks: the parts act in their order, merge in their order, and keep their own names."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_model

SCALE = ht.Hadamard(norm=None)
LOW_RANK = ht.LoRA(rank=2, targets=("attention_output",))
Weights = dict[str, Tensor]


@pytest.mark.parametrize("low_rank_first", [True, False])
def test_the_second_part_acts_on_what_the_first_has_made(low_rank_first: bool) -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(i: int, h: Tensor, x: Tensor) -> Tensor:
            site = f"adapter.layers.{i}.attention_output"
            first, second = (site, f"{site}_2") if low_rank_first else (f"{site}_2", site)
            change = (8 / 2) * (x @ own[f"{first}.A"].T @ own[f"{first}.B"].T)
            w, b = own[f"{second}.weight"], own[f"{second}.bias"]
            return (h + change) * w + b if low_rank_first else h * w + b + change

        return {"attention_output": at}

    check_against(ht.Stack(LOW_RANK, SCALE) if low_rank_first else ht.Stack(SCALE, LOW_RANK), by_hand)


BEFORE = ht.Hadamard(placement="attention_heads", norm=None)


@pytest.mark.parametrize(
    "parts",
    [
        (LOW_RANK, SCALE),
        (SCALE, LOW_RANK),
        (BEFORE, LOW_RANK),  # the low rank reads what stands before W_O, already scaled
        (LOW_RANK, BEFORE),
        (BEFORE, SCALE, LOW_RANK, ht.IA3(targets=("attention_heads",)), BEFORE, SCALE),
        (ht.IA3(), ht.LoRA(rank=2, targets=("key", "ffn_output")), ht.IA3(), ht.LoRA(rank=1)),
    ],
)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_parts_fold_in_their_order(architecture: str, parts: tuple[Adapter, ...]) -> None:
    model = tiny_model(architecture).double()
    attachment = ht.attach(model, ht.Stack(*parts))
    shake(attachment)
    expected = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-11)


def test_order_matters() -> None:
    one, two = (
        ht.attach(tiny_model("bert"), ht.Stack(*parts)) for parts in ((LOW_RANK, SCALE), (SCALE, LOW_RANK))
    )
    shake(one)
    swap = {"attention_output.": "attention_output_2.", "attention_output_2.": "attention_output."}
    state = one.state_dict()
    renamed = {n.replace(k, swap[k]): v for n, v in state.items() for k in swap if k in n}
    two.load_state_dict(renamed | {n: v for n, v in state.items() if n.startswith("head.")})
    assert not torch.allclose(logits(one.model), logits(two.model), atol=1e-3)


def test_three_times_the_same_adapter_is_three_adapters() -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    counts = ht.attach(model, ht.Stack(*[ht.Pfeiffer(gated="original")] * 3)).count()
    assert counts.loc[["adapter", "gate"], "stored"].tolist() == [3 * 894_528, 3 * 12 * 769]
    state = ht.attach(tiny_model("bert"), ht.Stack(*[ht.LoRA(layers=(0,))] * 3)).state_dict()
    sites = [f"layers.0.{target}{copy}" for target in ("query", "value") for copy in ("", "_2", "_3")]
    assert set(state) == {f"adapter.{site}.{name}" for site in sites for name in "AB"} | {
        "head.classifier.weight",
        "head.classifier.bias",
    }


def test_it_is_a_value() -> None:
    nested = ht.Stack(ht.LoRA(), ht.Stack(ht.IA3(), ht.Stack(SCALE)))
    assert nested == ht.Stack(ht.LoRA(), ht.IA3(), SCALE)
    assert hash(nested) == hash(ht.Stack(ht.LoRA(), ht.IA3(), SCALE))
    assert nested != ht.Stack(ht.IA3(), ht.LoRA(), SCALE)
    assert adapter_from_dict(json.loads(json.dumps(adapter_to_dict(nested)))) == nested


def test_of_two_parts_that_tune_one_parameter_the_first_gives_the_role() -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    attachment = ht.attach(model, ht.Stack(ht.LayerNormTuning(), ht.BitFit()))
    counts = attachment.count()["trained"]
    assert (counts["norm"], counts["adapter"]) == (18_432, 102_912 - 12 * 768)
    attachment.detach()
    counts = ht.attach(model, ht.Stack(ht.FullFineTuning(), ht.Hadamard())).count()["trained"]
    assert (counts["norm"], counts["adapter"]) == (0, 109_482_240 + 18_432)


def test_it_merges_only_if_every_part_does() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Stack(ht.LoRA(), ht.Houlsby(bottleneck=2)))
    weights = {name: value.clone() for name, value in attachment.model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="Bottleneck at attention_output"):
        attachment.merge()
    assert all(torch.equal(value, weights[name]) for name, value in attachment.model.state_dict().items())


def test_bad_parts() -> None:
    with pytest.raises(ArgumentError, match=r"Stack\(\) is not allowed"):
        ht.Stack()
    with pytest.raises(ArgumentError, match="'LoRA'"):
        ht.Stack(ht.IA3(), "LoRA")  # type: ignore[arg-type]
