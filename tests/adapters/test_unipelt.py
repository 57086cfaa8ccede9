"""UniPELT and what the 2024 paper makes of it: every gate's input and effect by hand, in series and side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.life import check_json, check_life, counts_on_bert_base, logits, shake
from tests.adapters.test_prefix import folded, in_front
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model

SMALL = {"bottleneck": 16, "length": 3, "rank": 2, "prefix_bottleneck": 5, "init": "normal"}
Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    ("architecture", "gated"),
    [*((name, gated) for name in ARCHITECTURES for gated in ("original", "masked")), ("bert", None)],
)
def test_life(architecture: str, gated: str | None, tmp_path: Path) -> None:
    check_life(architecture, ht.UniPELT(**SMALL, gated=gated), tmp_path)  # type: ignore[arg-type]


VARIANTS: dict[str, Callable[[], Adapter]] = {
    "prompt": lambda: ht.prompt_unipelt(2, **SMALL),
    "ia3": lambda: ht.Stack(
        ht.IA3(),
        ht.PrefixTuning(3, 5, gated="original"),
        ht.Pfeiffer(16, init="normal", gated="original"),
    ),
    "three": lambda: ht.stacked_unipelt(3, **SMALL),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_life_of_the_variants(architecture: str, variant: str, tmp_path: Path) -> None:
    check_life(architecture, VARIANTS[variant](), tmp_path)


@pytest.mark.parametrize("architecture", ["roberta", "mpnet", "bart", "gpt2"])
def test_masked_gates_know_the_prompt_from_padding(architecture: str, tmp_path: Path) -> None:
    check_life(architecture, ht.prompt_unipelt(2, **SMALL, gated="masked"), tmp_path)
    model = tiny_model(architecture).double()
    attachment = ht.attach(model, ht.prompt_unipelt(2, **SMALL, gated="masked", layers=(0,)))
    shake(attachment)
    with ht.record_gates(attachment) as record:
        logits(model)
        logits(model, **{name: rows[:1, :7] for name, rows in tiny_batch().items()})
    gates = record.table().pivot(index="gate", columns="example", values="value")
    assert gates[3].to_numpy() == pytest.approx(gates[0].to_numpy()), "the short row alone is the padded row"


def test_counts() -> None:
    parts = 894_528 + 184_320 + 294_912
    network = 9_857_024 - 184_320
    gate = 12 * 769
    counts = counts_on_bert_base(ht.UniPELT())
    assert counts["adapter"] == (parts + network, parts, parts)
    assert counts["gate"] == (4 * gate,) * 3, "adapter, prefix, query, value"
    direct = counts_on_bert_base(ht.UniPELT(gated=None, prefix_bottleneck=None))
    assert direct["adapter"] == (parts,) * 3 == (1_373_760,) * 3
    assert direct["gate"] == (0, 0, 0)
    assert counts_on_bert_base(ht.prompt_unipelt())["adapter"][1] == parts + 7_680
    ia3 = counts_on_bert_base(ht.ia3_prefix_bottleneck())
    assert ia3["adapter"][1:] == (55_296 + 184_320 + 894_528,) * 2
    assert ia3["gate"] == (2 * gate,) * 3
    three = counts_on_bert_base(ht.stacked_unipelt(3))
    assert three["adapter"] == tuple(3 * count for count in counts["adapter"])
    assert three["gate"] == (12 * gate,) * 3


def test_exact_key_sets() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.UniPELT(layers=(1,)))
    own = {"prefix": ("key", "value"), "query": ("A", "B"), "value": ("A", "B")}
    own["ffn_residual"] = ("down.weight", "down.bias", "up.weight", "up.bias")
    expected = {f"adapter.layers.1.{site}.{name}" for site, names in own.items() for name in names}
    expected |= {f"gate.layers.1.{site}.gate.{name}" for site in own for name in ("weight", "bias")}
    assert set(attachment.stored_state()) == expected | {"head.classifier.weight", "head.classifier.bias"}


def _by_hand(own: Weights, weights: Weights, gated: str | None, copies: tuple[str, ...]) -> Changes:
    real = tiny_batch()["attention_mask"].double()
    counted = real if gated == "masked" else torch.ones_like(real)

    def gate(label: str, read: Tensor) -> Tensor | float:
        if gated is None:
            return 1.0
        opening = torch.sigmoid(read @ own[f"gate.{label}.gate.weight"] + own[f"gate.{label}.gate.bias"])
        mean = (opening * counted).sum(1) / counted.sum(1)
        return mean[:, None, None]

    def lora(target: str, layer: int, h: Tensor, x: Tensor) -> Tensor:
        for copy in copies:
            label = f"layers.{layer}.{target}{copy}"
            scale = 8 / 2 if gated is None else gate(label, x)
            h = h + scale * (x @ own[f"adapter.{label}.A"].T @ own[f"adapter.{label}.B"].T)
        return h

    def prefix(which: int, layer: int, h: Tensor, x: Tensor) -> Tensor:
        for copy in copies:
            rows = folded(own, layer, copy)[which]
            h = in_front(rows * gate(f"layers.{layer}.prefix{copy}", x), h)
        return h

    def output(layer: int, total: Tensor, _: Tensor) -> Tensor:
        gain, shift = (
            weights[f"bert.encoder.layer.{layer}.output.LayerNorm.{n}"] for n in ("weight", "bias")
        )
        for copy in copies:
            label = f"layers.{layer}.ffn_residual{copy}"
            read = F.layer_norm(total, (16,), gain, shift, 1e-12)
            inner = torch.relu(
                read @ own[f"adapter.{label}.down.weight"].T + own[f"adapter.{label}.down.bias"]
            )
            added = inner @ own[f"adapter.{label}.up.weight"].T + own[f"adapter.{label}.up.bias"]
            total = total + gate(label, read) * added
        return F.layer_norm(total, (16,), gain, shift, 1e-12)

    return {
        "query": lambda i, h, x: lora("query", i, h, x),
        "key": lambda i, h, x: prefix(0, i, h, x),
        "value": lambda i, h, x: prefix(1, i, lora("value", i, h, x), x),
        "output": output,
    }


@pytest.mark.parametrize("gated", ["original", "masked", None])
def test_it_is_the_formula(gated: str | None) -> None:
    check_against(
        ht.UniPELT(**SMALL, gated=gated),  # type: ignore[arg-type]
        lambda own, weights: _by_hand(own, weights, gated, ("",)),
    )


def test_three_stand_side_by_side_and_in_series() -> None:
    check_against(
        ht.stacked_unipelt(3, **SMALL),
        lambda own, weights: _by_hand(own, weights, "original", ("", "_2", "_3")),
    )


# deberta's relative positions depend on the padded length by themselves
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "deberta"])
def test_masked_gates_do_not_see_padding_and_original_ones_do(architecture: str) -> None:
    longer, shorter = tiny_batch(), {name: rows[:1, :7] for name, rows in tiny_batch().items()}
    for gated, same in (("masked", True), ("original", False)):
        model = tiny_model(architecture).double()
        shake(ht.attach(model, ht.UniPELT(**SMALL, gated=gated)), scale=1.0)  # type: ignore[arg-type]
        difference = (logits(model, **longer)[:1] - logits(model, **shorter)).abs().max()
        assert bool(difference < 1e-6) == same, (gated, difference)


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "deberta-v2", "t5"])
def test_a_half_precision_backbone_has_its_adapters_in_float32(architecture: str) -> None:
    model = tiny_model(architecture).bfloat16()
    attachment = ht.attach(model, ht.prompt_unipelt(2, **SMALL))
    result = model(**tiny_batch(), labels=torch.tensor([0, 1, 0]))
    result.loss.backward()
    assert result.logits.dtype == torch.bfloat16
    assert {p.dtype for role in ("adapter", "gate") for p in attachment.parameters(role)} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attachment.parameters())


@pytest.mark.parametrize("gated", [None, "masked"])
def test_every_field_reaches_its_part(gated: str | None) -> None:
    fields = {**SMALL, "alpha": 6.0, "dropout": 0.25, "gated": gated, "layers": (1,)}
    attachment = ht.attach(tiny_model("bert"), ht.UniPELT(**fields))  # type: ignore[arg-type]
    parts = {label.removeprefix("layers.1."): i.module for label, i in attachment.insertions.items()}
    assert list(parts) == ["prefix_network", "prefix", "query", "value", "ffn_residual"]
    network, bottleneck = parts["prefix_network"], parts["ffn_residual"]
    assert (tuple(network.embedding.shape), network.down.out_features) == ((3, 16), 5)
    assert (bottleneck.down.out_features, bottleneck.dropout.p) == (16, 0.25)
    assert bottleneck.up.weight.any(), "init normal"
    for target in ("query", "value"):
        assert (len(parts[target].A), parts[target].scaling, parts[target].dropout.p) == (2, 3.0, 0.25)
        assert parts[target].B.any(), "init normal"
    modes = [getattr(part.gate, "mode", None) for name, part in parts.items() if name != "prefix_network"]
    assert modes == [gated] * 4


@pytest.mark.parametrize("times", [0, 1.5])
def test_at_least_one_is_stacked(times: int) -> None:
    with pytest.raises(ArgumentError, match=rf"times={times} is not allowed; it must be .*>= 1"):
        ht.stacked_unipelt(times)
    assert ht.stacked_unipelt(1) == ht.Stack(ht.UniPELT())


@pytest.mark.parametrize("variant", VARIANTS)
def test_descriptions_round_trip(variant: str) -> None:
    check_json(VARIANTS[variant]())
    check_json(ht.UniPELT(gated="masked", prefix_bottleneck=None, layers=(0, 1)))
    assert ht.ia3_prefix_bottleneck() == ht.Stack(
        ht.IA3(), ht.PrefixTuning(gated="original"), ht.Pfeiffer(gated="original")
    )
