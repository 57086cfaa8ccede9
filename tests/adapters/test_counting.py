from __future__ import annotations

from transformers import BertConfig

import hadamard_toolkit as ht


def test_costs_on_bert_base_with_the_head_left_out() -> None:
    adapters = {
        "head": ht.HeadOnly(),
        "Hadamard": ht.Hadamard(),
        "two of twelve": ht.Hadamard(layers=(0, 11)),
        "prefix": ht.PrefixTuning(),
        "gated LoRA": ht.LoRA(gated="original"),
    }
    counts = ht.parameter_counts(adapters, BertConfig())
    assert list(counts.index) == list(adapters)
    assert counts["trained"].tolist() == [0, 36_864, 6_144, 9_857_024, 294_912 + 24 * 769]
    assert counts["stored"].tolist() == [0, 36_864, 6_144, 184_320, 294_912 + 24 * 769]
    assert (counts["nonzero"] == counts["stored"]).all()
    assert counts["gates"].tolist() == [0, 0, 0, 0, 24 * 769]
    assert counts.loc["Hadamard", "% trained"] == 100 * 36_864 / 109_482_240
    assert counts.loc["prefix", "% stored"] == 100 * 184_320 / 109_482_240
    assert counts["sites"].tolist()[:2] == ["–", "attention_output"]
    assert counts.loc["gated LoRA", "sites"] == "query, value"
