"""Gates: one number per example, with and without padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.gates import Gate, Input, _Checkpoint
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.measurements.gates import GateRecord
from tests.adapters.test_attachment import logits, shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config, tiny_model

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
    with (
        gate.current.reading(Input((2, 3), torch.ones(2, 5))),
        pytest.raises(DataError, match=r"attention_mask .* = \(2, 3\) .* this has \(2, 5\)"),
    ):
        gate(torch.zeros(2, 3, 4))
    with pytest.raises(UnsupportedError, match="call the model, not its layers"):
        gate(torch.zeros(2, 3, 4))


def by_hand(attachment: ht.Attachment, label: str, read: Tensor, counted: Tensor) -> Tensor:
    """The values of the gate at `label`, given what it reads and which positions count."""
    gates = attachment.named_parameters("gate")
    weight, bias = (gates[f"gate.{label}.gate.{name}"] for name in ("weight", "bias"))
    opening = torch.sigmoid(read @ weight + bias)
    return ((opening * counted).sum(1) / counted.sum(1)).detach()


def values(record: GateRecord, layer: int, gate: str) -> Tensor:
    table = record.table()
    return torch.tensor(table[(table.layer == layer) & (table.gate == gate)]["value"].to_numpy()).float()


@pytest.mark.parametrize("gated", ["original", "masked"])
def test_a_prefix_gate_does_not_read_the_table_of_relative_positions(gated: str) -> None:
    model = tiny_model("deberta-v2", share_att_key=True)
    attachment = ht.attach(model, ht.PrefixTuning(length=2, bottleneck=None, gated=gated))
    shake(attachment)
    batch = tiny_batch()
    with ht.record_gates(attachment) as record, torch.no_grad():
        states = model.base_model(**batch, output_hidden_states=True).hidden_states
    counted = batch["attention_mask"] if gated == "masked" else torch.ones_like(batch["attention_mask"])
    for layer in range(3):
        found = values(record, layer, "prefix")
        assert found.shape == (3,), "one for each example, none for the table"
        torch.testing.assert_close(
            found, by_hand(attachment, f"layers.{layer}.prefix", states[layer], counted)
        )


@pytest.mark.parametrize("target", ["query", "key"])
def test_gated_lora_is_refused_where_the_projection_reads_relative_positions_too(target: str) -> None:
    model = tiny_model("deberta-v2", share_att_key=True)
    with pytest.raises(UnsupportedError, match=f"gated LoRA cannot be at '{target}'.*share_att_key=True"):
        ht.attach(model, ht.LoRA(targets=(target,), gated="original"))
    assert not hasattr(model, "hadamard_attachment")
    ht.attach(model, ht.LoRA(targets=(target,))).detach()
    ht.attach(model, ht.LoRA(targets=("value",), gated="original")).detach()
    ht.attach(tiny_model("deberta-v2"), ht.LoRA(targets=(target,), gated="original"))


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_an_encoder_that_runs_alone_has_the_mask_that_it_is_called_with(architecture: str) -> None:
    model = tiny_model(architecture)
    shake(ht.attach(model, GATED))
    batch, other = tiny_batch(), tiny_batch(rows=2, length=6, seed=1)
    decoder = {"decoder_input_ids": batch["input_ids"]}
    with torch.no_grad():
        whole = model.base_model(**batch, **decoder).encoder_last_hidden_state
        model.base_model(**other, decoder_input_ids=other["input_ids"])
        alone = model.base_model.encoder(**batch).last_hidden_state
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
@pytest.mark.parametrize("attached_with", [0, 13], ids=["padding known before", "after"])
def test_a_decoder_without_a_mask_does_not_count_its_padding(architecture: str, attached_with: int) -> None:
    model = tiny_model(architecture)
    padding, model.config.pad_token_id = model.config.pad_token_id, attached_with
    attachment = ht.attach(model, ht.LoRA(rank=2, gated="masked"))
    model.config.pad_token_id = padding  # as training does where the tokenizer pads with another id
    shake(attachment)
    seen: list[Tensor] = []
    attachment.sites(2, "query").module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    start = model.config.decoder_start_token_id
    ids = torch.tensor([[start, 7, 8, 9, 2, 0, 0], [start, 5, 6, 7, 8, 9, 11], [0, 0, start, 7, 8, 9, 11]])
    # in a row without padding, the end of the sequence (2) is told but not read
    counted = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    batch = tiny_batch(length=7)
    with ht.record_gates(attachment) as record, torch.no_grad():
        model.base_model(**batch, decoder_input_ids=ids)
    torch.testing.assert_close(
        values(record, 2, "query"), by_hand(attachment, "layers.2.query", seen[0], counted)
    )


CACHED: dict[str, Adapter] = {
    "lora": ht.LoRA(rank=2, gated="original"),
    "bottleneck": ht.Houlsby(bottleneck=4, gated="masked"),
    "prefix": ht.PrefixTuning(length=2, bottleneck=None, gated="original"),
}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bart", "t5"])
@pytest.mark.parametrize("method", CACHED)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_filled_cache_is_refused(architecture: str, method: str, name: str) -> None:
    model = tiny_model(architecture)
    attachment = ht.attach(model, CACHED[method])
    decoder: Any = getattr(model.base_model, "decoder", model.base_model)
    cache = decoder(torch.full((2, 3), 5), use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match=r"a gate needs the whole sequence.*use_cache=False"):
        decoder(torch.full((2, 1), 5), **{name: cache})
    with attachment.enabled(False):
        decoder(torch.full((2, 1), 5), past_key_values=cache)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_gates_in_the_encoder_alone_leave_the_decoder_its_cache(architecture: str) -> None:
    model = tiny_model(architecture)
    shake(ht.attach(model, ht.LoRA(rank=2, gated="masked", layers=(0, 1))))
    decoder: Any = model.base_model.decoder
    cache = decoder(torch.full((2, 3), 5), use_cache=True).past_key_values
    decoder(torch.full((2, 1), 5), past_key_values=cache)


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert"]
)
@pytest.mark.parametrize("adapter", [ht.Houlsby, ht.ParallelAdapter])
def test_a_gate_on_chunks_of_the_input_is_refused(architecture: str, adapter: type[ht.Houlsby]) -> None:
    whole, chunked = tiny_model(architecture), tiny_model(architecture, chunk_size_feed_forward=3)
    for model in (whole, chunked):
        shake(ht.attach(model, adapter(bottleneck=4, gated="original")))
    logits(whole)
    with pytest.raises(
        UnsupportedError, match=r"whole input .*= \(3, 9\).*\(3, 3\).*chunk_size_feed_forward=0"
    ):
        logits(chunked)


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert"]
)
def test_chunks_change_nothing_where_no_gate_reads_them(architecture: str) -> None:
    adapter = ht.Stack(
        ht.PromptTuning(length=3), ht.PrefixTuning(2, gated="masked"), ht.LoRA(gated="masked"), ht.MAM(2, 4)
    )
    found = []
    for size in (0, 3):
        model = tiny_model(architecture, chunk_size_feed_forward=size).double()
        shake(ht.attach(model, adapter))
        found.append(logits(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


CHECKPOINTING = [name for name in ARCHITECTURES if tiny_model(name).supports_gradient_checkpointing]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", CHECKPOINTING)
def test_gradient_checkpointing_remembers_the_masks_of_each_pass(architecture: str, reentrant: bool) -> None:
    batches = [tiny_batch(), tiny_batch(seed=1)]
    batches[1]["attention_mask"] = torch.ones_like(batches[1]["input_ids"])
    undropped = {name: 0.0 for name in tiny_config(architecture).to_dict() if "drop" in name}
    gradients = []
    for again in (False, True):
        model = tiny_model(architecture, **undropped).double().train()
        adapter = ht.Stack(ht.PromptTuning(length=2), ht.UniPELT(4, 2, 2, gated="masked"), ht.MAM(2, 4))
        attachment = ht.attach(model, adapter)
        shake(attachment)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        # the second pass has begun before the first one's layers are computed again
        losses = [model(**batch, labels=torch.tensor([0, 1, 0])).loss for batch in batches]
        (losses[0] + 3 * losses[1]).backward()
        gradients.append({name: p.grad for name, p in attachment.named_parameters().items()})
        attachment.detach()
        assert not any(
            isinstance(vars(m).get("_gradient_checkpointing_func"), _Checkpoint) for m in model.modules()
        )
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-10, msg=name)
