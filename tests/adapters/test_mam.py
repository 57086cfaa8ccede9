"""MAM: a prefix and a scaled parallel adapter, by the formulas of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.life import check_json, check_life, counts_on_bert_base
from tests.adapters.test_prefix import folded, in_front
from tests.architectures import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_life(architecture: str, tmp_path: Path) -> None:
    check_life(architecture, ht.MAM(length=3, bottleneck=16, prefix_bottleneck=6, init="normal"), tmp_path)


def test_counts() -> None:
    prefix = 12 * 2 * 30 * 768
    parallel = 12 * (768 * 512 + 512 + 512 * 768 + 768)
    network = 30 * 768 + (768 * 512 + 512) + 12 * 2 * 768 * (512 + 1)
    assert counts_on_bert_base(ht.MAM())["adapter"] == (
        network + parallel,
        prefix + parallel,
        prefix + parallel,
    )
    small = ht.MAM(length=16, bottleneck=16, scale=2.0, prefix_bottleneck=None)
    assert counts_on_bert_base(small)["adapter"] == (12 * (2 * 16 * 768 + 2 * 768 * 16 + 16 + 768),) * 3


def test_exact_key_sets() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.MAM(length=2, bottleneck=4, layers=(1,)))
    assert set(attachment.stored_state()) == {
        "adapter.layers.1.prefix.key",
        "adapter.layers.1.prefix.value",
        *(
            f"adapter.layers.1.ffn_output.{part}.{kind}"
            for part in ("down", "up")
            for kind in ("weight", "bias")
        ),
        "head.classifier.weight",
        "head.classifier.bias",
    }


def test_it_is_the_formula() -> None:
    def by_hand(own: dict[str, Tensor], weights: dict[str, Tensor]) -> Changes:
        def beside(layer: int, out: Tensor, x: Tensor) -> Tensor:
            w = {
                name: own[f"adapter.layers.{layer}.ffn_output.{name}"]
                for name in ("down.weight", "down.bias", "up.weight", "up.bias")
            }
            hidden = torch.relu(x @ w["down.weight"].T + w["down.bias"])
            return out + 4 * (hidden @ w["up.weight"].T + w["up.bias"])

        return {
            "key": lambda i, h, x: in_front(folded(own, i)[0], h),
            "value": lambda i, h, x: in_front(folded(own, i)[1], h),
            "beside_ffn": beside,
        }

    check_against(ht.MAM(length=4, bottleneck=5, prefix_bottleneck=6), by_hand)


def test_every_field_reaches_its_part() -> None:
    adapter = ht.MAM(
        3, bottleneck=5, scale=2.0, prefix_bottleneck=6, dropout=0.25, init="normal", layers=(1,)
    )
    parts = {label: i.module for label, i in ht.attach(tiny_model("bert"), adapter).insertions.items()}
    assert list(parts) == ["prefix_network", "layers.1.prefix", "layers.1.ffn_output"]
    network, parallel = parts["prefix_network"], parts["layers.1.ffn_output"]
    assert (tuple(network.embedding.shape), network.down.out_features) == ((3, 16), 6)
    assert (parallel.down.out_features, parallel.scale, parallel.dropout.p) == (5, 2.0, 0.25)
    assert parallel.parallel
    assert parallel.up.weight.any(), "init normal"


def test_description_round_trips() -> None:
    check_json(ht.MAM(length=16, prefix_bottleneck=None, layers=(0, 3)))
