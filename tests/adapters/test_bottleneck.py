"""Bottleneck adapters: their formulas by hand, where they sit, what they count and declare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.bottleneck import Bottleneck
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_batch, tiny_model

Weights = dict[str, Tensor]


def change(own: Weights, name: str, x: Tensor, act: object = torch.relu) -> Tensor:
    """up(act(down(x))) of the adapter at `name`."""
    down, up = (
        (own[f"adapter.{name}.{part}.weight"], own[f"adapter.{name}.{part}.bias"]) for part in ("down", "up")
    )
    return act(x @ down[0].T + down[1]) @ up[0].T + up[1]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", torch.relu), ("gelu", F.gelu), ("tanh", torch.tanh)]
)
def test_houlsby_stands_behind_both_blocks(activation: str, function: object) -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(name: str) -> object:
            return lambda i, h, x: h + 0.5 * change(own, f"layers.{i}.{name}", h, function)

        return {name: at(name) for name in ("attention_output", "ffn_output")}  # type: ignore[misc]

    check_against(ht.Houlsby(bottleneck=5, activation=activation, scale=0.5), by_hand)


@pytest.mark.parametrize("gated", [None, "original", "masked"])
def test_pfeiffer_reads_the_norm_adds_to_what_it_read_and_applies_it_again(gated: str | None) -> None:
    real = tiny_batch()["attention_mask"].double()
    counted = real if gated == "masked" else torch.ones_like(real)

    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(layer: int, total: Tensor, x: Tensor) -> Tensor:
            name = f"layers.{layer}.ffn_residual"
            gain, shift = (
                weights[f"bert.encoder.layer.{layer}.output.LayerNorm.{n}"] for n in ("weight", "bias")
            )
            read = F.layer_norm(total, (16,), gain, shift, 1e-12)
            added = change(own, name, read)
            if gated:
                opening = torch.sigmoid(
                    read @ own[f"gate.{name}.gate.weight"] + own[f"gate.{name}.gate.bias"]
                )
                added = added * ((opening * counted).sum(1) / counted.sum(1))[:, None, None]
            return F.layer_norm(total + added, (16,), gain, shift, 1e-12)

        return {"output": at}

    check_against(ht.Pfeiffer(bottleneck=5, gated=gated), by_hand)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_parallel_adapter_reads_what_the_feed_forward_block_reads(scale: float) -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        return {"beside_ffn": lambda i, h, x: h + scale * change(own, f"layers.{i}.ffn_output", x)}

    check_against(ht.ParallelAdapter(bottleneck=5, scale=scale), by_hand)


@pytest.mark.parametrize("architecture", ["modernbert", "t5", "gpt2", "llama"])
def test_before_a_pre_norm_pfeiffer_is_the_second_half_of_houlsby(architecture: str) -> None:
    pfeiffer = ht.attach(tiny_model(architecture), ht.Pfeiffer(bottleneck=4))
    houlsby = ht.attach(tiny_model(architecture), ht.Houlsby(bottleneck=4))
    shake(pfeiffer)
    houlsby.load_state_dict(pfeiffer.state_dict())  # Houlsby's first half stays the identity
    assert torch.equal(logits(pfeiffer.model), logits(houlsby.model))


@pytest.mark.parametrize(
    ("adapter", "expected", "gates"),
    [
        (ht.Houlsby(), 2_379_264, 0),
        (ht.Pfeiffer(), 894_528, 0),
        (ht.ParallelAdapter(), 1_189_632, 0),
        (ht.Pfeiffer(gated="original"), 894_528, 12 * 769),
        (ht.Houlsby(bottleneck=768), 24 * (2 * 768 * 768 + 2 * 768), 0),
        (ht.Pfeiffer(layers=(11,)), 894_528 // 12, 0),
    ],
)
def test_counts_of_bert_base(adapter: Adapter, expected: int, gates: int) -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    counts = ht.attach(model, adapter).count()
    assert counts.loc["adapter"].to_dict() == dict.fromkeys(("trained", "stored", "nonzero"), expected)
    assert counts.loc["gate"].to_dict() == dict.fromkeys(("trained", "stored", "nonzero"), gates)


@pytest.mark.parametrize(
    ("adapter", "sites"),
    [
        (ht.Houlsby(layers=(1,)), ("attention_output", "ffn_output")),
        (ht.Pfeiffer(layers=(1,)), ("ffn_residual",)),
        (ht.ParallelAdapter(layers=(1,)), ("ffn_output",)),
    ],
)
def test_exact_key_sets(adapter: Adapter, sites: tuple[str, ...]) -> None:
    names = [f"{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
    expected = {f"adapter.layers.1.{site}.{name}" for site in sites for name in names}
    state = ht.attach(tiny_model("bert"), adapter).state_dict()
    assert set(state) == expected | {"head.classifier.weight", "head.classifier.bias"}


def test_initial_values() -> None:
    for init, spread in (("zero", 0.0), ("normal", 0.02)):
        state = ht.attach(tiny_model("bert"), ht.Houlsby(bottleneck=16, init=init)).state_dict()
        up = torch.stack([value for name, value in state.items() if name.endswith("up.weight")])
        down = torch.stack([value for name, value in state.items() if name.endswith("down.weight")])
        assert float(up.std()) == pytest.approx(spread, abs=0.002)
        assert float(down.std()) == pytest.approx(0.02 if init == "normal" else (3 * 16) ** -0.5, rel=0.1)
        assert not any(
            value.any() for name, value in state.items() if name.startswith("adapter") and "bias" in name
        )


def test_with_normal_initial_values_every_projection_is_seen_by_the_loss() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Houlsby(bottleneck=8, init="normal"))
    model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    projections = [p for name, p in attachment.named_parameters("adapter").items() if name.endswith("weight")]
    assert len(projections) == 12
    assert all(p.grad is not None and p.grad.any() for p in projections)


def test_its_projections_are_what_may_be_pruned() -> None:
    module = Bottleneck(16, 4, gated="masked")
    assert {name: module.get_parameter(name).shape for name in Bottleneck.projections} == {
        "down.weight": (4, 16),
        "up.weight": (16, 4),
    }


def test_a_half_precision_backbone_has_its_adapter_in_float32() -> None:
    model = tiny_model("bert").bfloat16()
    attachment = ht.attach(model, ht.Pfeiffer(bottleneck=4))
    assert {p.dtype for p in attachment.parameters("adapter")} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("adapter", [ht.Houlsby(), ht.Pfeiffer(), ht.ParallelAdapter()])
def test_none_of_them_merges(adapter: Adapter) -> None:
    attachment = ht.attach(tiny_model("bert"), adapter)
    with pytest.raises(UnsupportedError, match="not linear in its input: it cannot be merged"):
        attachment.merge()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "sine"}, "activation='sine' is not allowed; choose one of 'relu'"),
        ({"init": "lora"}, "init='lora' is not allowed"),
        ({"gated": "yes"}, "gated='yes' is not allowed"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.Houlsby(**fields)  # type: ignore[arg-type]
