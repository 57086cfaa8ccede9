"""What may be masked, by kind and by name."""

from __future__ import annotations

from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError
from tests.sparsity.tiny import attached


@pytest.mark.filterwarnings("ignore:nothing stays")
def test_kinds_and_names_of_what_may_be_masked() -> None:
    adapter = ht.Stack(
        ht.Houlsby(bottleneck=3, init="normal", gated="masked"),
        ht.LayerNormTuning(),
        ht.PrefixTuning(2, bottleneck=None),
    )
    counts = {
        kind: ht.sparsify(attached(adapter), scorer="random", sparsity=0.5, maskable=kind).entries
        for kind in ("projections", "biases", "gates", "norms", "prefixes", "all")
    }
    assert counts == {
        "projections": 6 * 2 * 3 * 16,
        "biases": 6 * (3 + 16),
        "gates": 6 * 17,
        "norms": 3 * 32,
        "prefixes": 3 * 2 * 2 * 16,
        "all": sum(value for kind, value in counts.items() if kind != "all"),
    }
    name = "adapter.layers.1.ffn_output.up.bias"
    masks = ht.sparsify(attached(adapter), scorer="random", sparsity=0.5, maskable=(name, "norms"))
    assert [key for key in masks.kept if not key.startswith("norm.")] == [name]


@pytest.mark.parametrize(
    ("adapter", "maskable", "message"),
    [
        (ht.Hadamard(), "projections", r"has no projections that can be masked; it has vectors, norms"),
        (ht.HeadOnly(), "projections", "nothing that can be masked"),
        (ht.HeadOnly(), "all", "nothing that can be masked"),
        (ht.PrefixTuning(2), "all", "nothing that can be masked"),
        (ht.PrefixTuning(2), ("adapter.prefix_network.embedding",), "is not stored"),
        (ht.Houlsby(), ("head.classifier.weight",), "belongs to the head"),
        (ht.Houlsby(), "weights", "maskable='weights' is not allowed; choose one of 'all', 'projections'"),
        (ht.Houlsby(), (), "nothing that can be masked"),
    ],
)
def test_what_cannot_be_masked_is_refused(adapter: Adapter, maskable: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.sparsify(attached(adapter), scorer="random", sparsity=0.5, maskable=maskable)
