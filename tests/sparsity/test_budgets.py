"""Widths and sparsities of one budget, against the arithmetic of the paper's set-up."""

from __future__ import annotations

import pytest
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.architectures import tiny_config, tiny_model


def test_houlsby_on_bert_base_without_biases() -> None:
    found = ht.large_sparse(2_359_296, ht.Houlsby(), BertConfig())
    assert found[["size", "maskable", "kept", "sparsity"]].values.tolist() == [
        [64, 2_359_296, 2_359_296, 0.0],
        [128, 4_718_592, 2_359_296, 0.5],
        [256, 9_437_184, 2_359_296, 0.75],
        [512, 18_874_368, 2_359_296, 0.875],
    ]
    assert list(found["other"]) == [24 * (size + 768) for size in (64, 128, 256, 512)]
    assert list(found["adapter"]) == [ht.Houlsby(bottleneck=size) for size in (64, 128, 256, 512)]


def test_houlsby_on_bert_base_with_biases() -> None:
    found = ht.large_sparse(2_379_264, ht.Houlsby(), BertConfig(), biases=True, sizes=(64, 256))
    assert list(found["total"]) == [2_379_264, 2_379_264]
    assert list(found["other"]) == [19_968, 24_576]
    assert list(found["kept"]) == [2_359_296, 2_354_688]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    "adapter", [ht.Houlsby(init="normal"), ht.LoRA(init="normal"), ht.Pfeiffer(init="normal")]
)
def test_the_pairs_meet_the_budget_exactly_when_they_are_used(adapter: ht.Houlsby, biases: bool) -> None:
    budget = 701
    found = ht.large_sparse(budget, adapter, tiny_model("bert"), biases=biases)
    assert len(found) >= 3
    for row in found.itertuples():
        attachment = ht.attach(tiny_model("bert"), row.adapter)
        masks = ht.sparsify(attachment, scorer="random", sparsity=row.sparsity)
        nonzero = attachment.count().loc["adapter", "nonzero"]
        assert (masks.entries, masks.entries - masks.removed) == (row.maskable, row.kept)
        assert nonzero == row.total
        assert (nonzero if biases else masks.entries - masks.removed) == budget


def test_a_narrow_adapter_keeps_one_unit_of_every_part() -> None:
    adapter = ht.Stack(ht.Houlsby(bottleneck=64, init="normal"), ht.LoRA(rank=8, init="normal"))
    found = ht.large_sparse(300, adapter, tiny_config("bert"), sizes=(1, 64))
    assert [(row.adapters[0].bottleneck, row.adapters[1].rank) for row in found["adapter"]] == [
        (1, 1),
        (64, 8),
    ]


def test_what_no_width_can_meet_is_refused() -> None:
    config = tiny_config("bert")
    with pytest.raises(ArgumentError, match=r"budget=100 with biases is not allowed"):
        ht.large_sparse(100, ht.Houlsby(), config, biases=True)
    with pytest.raises(ArgumentError, match="none of the sizes tried"):
        ht.large_sparse(10_000, ht.Houlsby(), config, sizes=(1, 2))
    with pytest.raises(ArgumentError, match="budget=0"):
        ht.large_sparse(0, ht.Houlsby(), config)
    with pytest.raises(ArgumentError, match="sizes=0"):
        ht.large_sparse(100, ht.Houlsby(), config, sizes=(0,))
    with pytest.raises(UnsupportedError, match="has no bottleneck or rank"):
        ht.large_sparse(100, ht.AdapterFusion(("a",)), config)
    with pytest.raises(ArgumentError, match="no projections"):
        ht.large_sparse(100, ht.Hadamard(), config)


def test_a_budget_is_kept_from_one_entry_to_all_of_them() -> None:
    adapter, config = ht.LoRA(rank=1, init="normal"), tiny_config("bert")
    entries = ht.large_sparse(1, adapter, config, sizes=(1,))["maskable"].item()
    for kept in (1, entries):
        row = ht.large_sparse(kept, adapter, config, sizes=(1,)).iloc[0]
        assert (row["kept"], row["sparsity"]) == (kept, 1 - kept / entries)
    with pytest.raises(ArgumentError, match=f"budget={entries + 1} without biases is not allowed"):
        ht.large_sparse(entries + 1, adapter, config, sizes=(1,))
    houlsby = ht.Houlsby(bottleneck=1, init="normal")
    other = ht.large_sparse(1, houlsby, config, sizes=(1,))["other"].item()
    assert ht.large_sparse(other + 1, houlsby, config, sizes=(1,), biases=True)["kept"].tolist() == [1]
    with pytest.raises(ArgumentError, match="its biases alone exceed it"):
        ht.large_sparse(other, houlsby, config, sizes=(1,), biases=True)
