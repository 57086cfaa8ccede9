"""Gates: one number per example, with and without padding, on record."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.gates import Gate
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_batch, tiny_model

GATED = ht.Stack(ht.LoRA(rank=2, gated="masked"), ht.Pfeiffer(bottleneck=4, gated="masked"))


def test_a_fresh_gate_stands_near_one_half() -> None:
    torch.manual_seed(0)
    gate = Gate(768, "original")
    value = gate(torch.randn(4, 7, 768))
    assert value.shape == (4, 1, 1)
    assert (value - 0.5).abs().max() < 0.1
    assert 0.017 < float(gate.weight.detach().std()) < 0.023
    assert not gate.bias.any()


@pytest.mark.parametrize(("mode", "indifferent"), [("masked", True), ("original", False)])
def test_only_the_masked_gate_is_indifferent_to_the_length_of_the_padding(
    mode: str, indifferent: bool
) -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.LoRA(rank=2, gated=mode))
    shake(attachment)
    batch = tiny_batch()
    longer = {name: torch.nn.functional.pad(value, (0, 6)) for name, value in batch.items()}
    with torch.no_grad():
        same = torch.allclose(model(**batch).logits, model(**longer).logits, atol=1e-6)
    assert same == indifferent


def test_record() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(
        model, ht.Stack(ht.LoRA(rank=2, gated="original"), ht.Pfeiffer(bottleneck=4, gated="original"))
    )
    shake(attachment)
    before = logits(model)
    read: list[Tensor] = []
    handle = attachment.sites(1, "value").module.register_forward_pre_hook(
        lambda m, args: read.append(args[0])
    )
    with ht.record_gates(attachment) as record, torch.no_grad():
        for seed in (0, 1):
            model(**tiny_batch(seed=seed))
    handle.remove()
    table = record.table()
    assert list(table.columns) == ["layer", "gate", "example", "value"]
    assert len(table) == 3 * 3 * 6, "three layers, three gates, two batches of three"
    assert sorted(set(table["gate"])) == ["ffn_residual", "query", "value"]
    gates = attachment.named_parameters("gate")
    weight, bias = (gates[f"gate.layers.1.value.gate.{name}"] for name in ("weight", "bias"))
    expected = torch.sigmoid(torch.cat(read) @ weight + bias).mean(1)
    mine = table[(table.layer == 1) & (table.gate == "value")].sort_values("example")
    torch.testing.assert_close(torch.tensor(mine["value"].to_numpy()).float(), expected.detach())
    assert torch.equal(logits(model), before), "recording changes nothing"
    assert len(record.table()) == len(table), "and ends with its block"


def test_an_adapter_without_gates_has_none_to_record() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA())
    with pytest.raises(UnsupportedError, match="no gates to record"), ht.record_gates(attachment):
        pass


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_a_decoders_gates_count_by_the_decoders_mask(architecture: str) -> None:
    model = tiny_model(architecture)
    attachment = ht.attach(model, ht.LoRA(rank=2, gated="masked"))
    shake(attachment)
    seen: list[Tensor] = []
    decoder = attachment.sites(2, "query").module
    decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    batch = tiny_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 4:] = 0
    with ht.record_gates(attachment) as record, torch.no_grad():
        model(**batch, decoder_attention_mask=mask)
    table = record.table()
    gates = attachment.named_parameters("gate")
    weight, bias = (gates[f"gate.layers.2.query.gate.{name}"] for name in ("weight", "bias"))
    opening = torch.sigmoid(seen[0] @ weight + bias)
    expected = (opening * mask).sum(1) / mask.sum(1)
    mine = table[(table.layer == 2) & (table.gate == "query")]["value"].to_numpy()
    torch.testing.assert_close(torch.tensor(mine).float(), expected.detach())


def test_without_a_mask_nothing_is_padding() -> None:
    model = tiny_model("bert")
    masked = ht.attach(model, GATED)
    shake(masked)
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_the_mask_of_one_call_is_not_that_of_the_next() -> None:
    model = tiny_model("bert")
    shake(ht.attach(model, GATED))
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        fresh = model(ids).logits
        model(**tiny_batch())
        assert torch.equal(model(ids).logits, fresh)


def test_a_deep_copy_sees_its_own_masks() -> None:
    model = tiny_model("bert")
    shake(ht.attach(model, GATED))
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(tiny_batch()["input_ids"])
    assert torch.equal(logits(twin), expected)


def test_bad_input() -> None:
    with pytest.raises(
        ArgumentError, match="gated='mean' is not allowed; choose one of 'original', 'masked'"
    ):
        Gate(4, "mean")
    with pytest.raises(UnsupportedError, match=r"reads \[batch, positions, width\].*\(5, 4\)"):
        Gate(4, "original")(torch.zeros(5, 4))
    gate = Gate(4, "masked")
    gate.batch.masks = {"attention_mask": torch.ones(2, 5)}
    with pytest.raises(DataError, match=r"\(2, 3\).*attention_mask has \(2, 5\)"):
        gate(torch.zeros(2, 3, 4))
