"""Prefix tuning: its formula in every architecture, its training-time network, and the way into attention and out."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.attention import attention_of
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.life import check_json, check_life, counts_on_bert_base, logits, shake, spread
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config, tiny_model

WRITTEN_OUT = ("deberta", "deberta-v2", "mpnet")  # they compute attention themselves
INTERFACE = tuple(name for name in ARCHITECTURES if name not in WRITTEN_OUT)
IN_FLOAT32 = ("modernbert", "llama")  # their eager softmax is in float32 always
Weights = dict[str, Tensor]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bottleneck", [8, None])
def test_life(architecture: str, bottleneck: int | None, tmp_path: Path) -> None:
    check_life(architecture, ht.PrefixTuning(length=3, bottleneck=bottleneck), tmp_path)


def test_counts() -> None:
    nothing = (0, 0, 0)
    network = 10 * 768 + (768 * 512 + 512) + (512 * 12 * 2 * 768 + 12 * 2 * 768)
    assert network == 9_857_024
    head = (1538, 1538, 1538)
    assert counts_on_bert_base(ht.PrefixTuning()) == {
        "adapter": (network, 184_320, 184_320),
        "norm": nothing,
        "gate": nothing,
        "head": head,
    }
    assert counts_on_bert_base(ht.PrefixTuning(bottleneck=None))["adapter"] == (184_320,) * 3
    gated = counts_on_bert_base(ht.PrefixTuning(bottleneck=None, gated="masked", layers=(0, 5)))
    assert gated["adapter"] == (30_720,) * 3
    assert gated["gate"] == (2 * 769,) * 3


def test_exact_key_sets() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.PrefixTuning(length=2, bottleneck=4, layers=(0, 2)))
    head = {"head.classifier.weight", "head.classifier.bias"}
    network = {f"adapter.prefix_network.{name}" for name in ("embedding", "down.weight", "down.bias")}
    rows = {f"adapter.layers.{layer}.prefix.up.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    assert set(attachment.state_dict()) == head | network | rows
    folded = {f"adapter.layers.{layer}.prefix.{name}" for layer in (0, 2) for name in ("key", "value")}
    assert set(attachment.stored_state()) == head | folded


def folded(own: Weights, layer: int, suffix: str = "") -> tuple[Tensor, Tensor]:
    """P_K and P_V of one layer by the formula of the network, or as they stand."""
    label, network = f"adapter.layers.{layer}.prefix{suffix}", f"adapter.prefix_network{suffix}"
    if f"{label}.key" in own:
        return own[f"{label}.key"], own[f"{label}.value"]
    hidden = torch.tanh(
        own[f"{network}.embedding"] @ own[f"{network}.down.weight"].T + own[f"{network}.down.bias"]
    )
    both = hidden @ own[f"{label}.up.weight"].T + own[f"{label}.up.bias"]
    return both[:, :16], both[:, 16:]


def in_front(rows: Tensor, of: Tensor) -> Tensor:
    return torch.cat([rows.expand(len(of), -1, -1), of], 1)


@pytest.mark.parametrize("bottleneck", [8, None])
def test_bert_with_prefixes_is_the_formula(bottleneck: int | None) -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        return {
            "key": lambda i, h, x: in_front(folded(own, i)[0], h),
            "value": lambda i, h, x: in_front(folded(own, i)[1], h),
        }

    check_against(ht.PrefixTuning(length=4, bottleneck=bottleneck), by_hand)


@pytest.mark.parametrize("gated", ["original", "masked"])
def test_one_gate_opens_keys_and_values(gated: str) -> None:
    real = tiny_batch()["attention_mask"].double()
    counted = real if gated == "masked" else torch.ones_like(real)

    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(which: int, layer: int, h: Tensor, x: Tensor) -> Tensor:
            gate = f"gate.layers.{layer}.prefix.gate"
            opening = torch.sigmoid(x @ own[f"{gate}.weight"] + own[f"{gate}.bias"])
            gate_value = (opening * counted).sum(1) / counted.sum(1)
            return in_front(gate_value[:, None, None] * folded(own, layer)[which], h)

        return {"key": lambda i, h, x: at(0, i, h, x), "value": lambda i, h, x: at(1, i, h, x)}

    check_against(ht.PrefixTuning(length=4, bottleneck=6, gated=gated), by_hand)


def _record(
    model: PreTrainedModel, layer: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled query, value and finished scores of one self-attention, as the model itself computes them."""
    _, host = attention_of(Sites(model), layer)
    seen: dict[str, Any] = {}
    source: Any = sys.modules[type(host).__module__]
    softmax = F.softmax

    def spy(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        if seen.get("inside"):
            seen.setdefault("scores", scores)
        return softmax(scores, *args, **options)

    enter = host.register_forward_pre_hook(lambda *_: seen.update(inside=True))
    leave = host.register_forward_hook(lambda *_: seen.update(inside=False))
    handles = [enter, leave]
    with monkeypatch.context() as patch:
        patch.setattr(F, "softmax", spy)
        if hasattr(source, "eager_attention_forward"):
            eager = source.eager_attention_forward

            def listen(
                module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
            ) -> Any:
                if module is host:
                    scaling = options.get("scaling")
                    seen.setdefault(
                        "query", query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
                    )
                    seen.setdefault("value", value)
                return eager(module, query, key, value, *args, **options)

            patch.setattr(source, "eager_attention_forward", listen)
        else:
            for name in ("query", "value"):
                site = Sites(model)(layer, name)

                def note(module: Any, args: Any, output: Tensor, name: str = name, site: Any = site) -> None:
                    if name not in seen and seen.get("inside"):
                        part = site.projection_slice.read(output) if site.projection_slice else output
                        if model.config.model_type == "deberta":
                            part = part + getattr(host, f"{name[0]}_bias")
                        seen[name] = part.unflatten(-1, (2, -1)).transpose(1, 2)

                handles.append(site.module.register_forward_hook(note))
        logits(model)
    for handle in handles:
        handle.remove()
    if model.config.model_type in WRITTEN_OUT:
        parts = 1 if model.config.model_type == "mpnet" else 3  # content, and two with positions
        seen["query"] = seen["query"] / (parts * 8) ** 0.5
    return seen["query"], seen["value"], seen["scores"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_is_over_prefix_and_input_together(
    architecture: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax([q P_K; scores]) [P_V; V], where q, V and the scores (masks, biases and all) are the model's own.

    Layer 1 of modernbert is a local one, layer 2 of bart and t5 the decoder's.
    """
    changes = {"local_attention": 4} if architecture == "modernbert" else {}
    model = tiny_model(architecture, **changes).double()
    for part in model.modules():  # transformers 5.17 does not hand it on to the stacks of T5
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    attachment = ht.attach(model, ht.PrefixTuning(length=5, bottleneck=None, layers=(layer,)))
    spread(attachment)
    own = attachment.state_dict()
    heads_of: list[Tensor] = []
    site = attachment.sites(layer, "attention_heads")
    handle = site.module.register_forward_pre_hook(lambda module, args: heads_of.append(args[0]))
    logits(model)
    handle.remove()
    with attachment.enabled(False):
        query, value, scores = _record(model, layer, monkeypatch)

    width = query.shape[-1]

    def rows(name: str) -> Tensor:
        found = own[f"adapter.layers.{layer}.prefix.{name}"].unflatten(-1, (-1, width)).transpose(0, 1)
        return found.repeat_interleave(2 // len(found), 0)[None]  # llama's two heads share one key

    value = value.repeat_interleave(2 // value.shape[1], 1)
    prefix_scores = query @ rows("key").transpose(-1, -2)
    together = torch.softmax(torch.cat([prefix_scores, scores], -1), -1)
    expected = together @ torch.cat([rows("value").expand(len(value), -1, -1, -1), value], 2)
    tolerance = 1e-6 if architecture in IN_FLOAT32 else 1e-9  # deberta rounds its scale to float32
    torch.testing.assert_close(heads_of[0], expected.transpose(1, 2).flatten(-2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", INTERFACE)
@pytest.mark.parametrize("masked", [True, False])
def test_eager_and_sdpa_agree_and_may_be_switched_while_attached(architecture: str, masked: bool) -> None:
    model = tiny_model(architecture).double()
    attachment = ht.attach(model, ht.PrefixTuning(length=3, bottleneck=None))
    spread(attachment)
    batch = tiny_batch()
    if not masked:  # then sdpa makes causal masks by itself
        batch = {"input_ids": batch["input_ids"][1:]}
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(**batch).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6 if architecture in IN_FLOAT32 else 1e-11)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_causal_order_holds_behind_the_prefix(architecture: str) -> None:
    model = tiny_model(architecture).double()
    spread(ht.attach(model, ht.PrefixTuning(length=3, bottleneck=None)))
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 5] = 3 if ids[0, 5] != 3 else 4
    with torch.no_grad():
        one, other = (model.base_model(input_ids=x).last_hidden_state for x in (ids, changed))
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_stays_hidden(architecture: str) -> None:
    model = tiny_model(architecture).double()
    spread(ht.attach(model, ht.PrefixTuning(length=3, bottleneck=None)))
    batch = tiny_batch()
    short = {name: rows[:1, :7] for name, rows in batch.items()}
    alone = logits(model, **short)
    # deberta's relative positions are cut off at the longest input: it depends on the padded length by itself
    if architecture != "deberta":
        torch.testing.assert_close(logits(model)[:1], alone, rtol=0, atol=1e-9)


def test_layers_without_a_prefix_are_untouched() -> None:
    model = tiny_model("bert")
    states = [model.bert(**tiny_batch(), output_hidden_states=True).hidden_states]
    config = model.bert.encoder.layer[0].attention.self.config
    attachment = ht.attach(model, ht.PrefixTuning(layers=(2,)))
    assert model.config._attn_implementation == "sdpa", "the model's config does not name us"
    assert model.bert.encoder.layer[0].attention.self.config is config
    states.append(model.bert(**tiny_batch(), output_hidden_states=True).hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(states[0][:3], states[1][:3], strict=True))
    assert not torch.equal(states[0][3], states[1][3])
    attachment.detach()


def test_two_prefixes_stand_side_by_side() -> None:
    model = tiny_model("bert").double()
    attachment = ht.attach(
        model, ht.Stack(ht.PrefixTuning(2, bottleneck=None), ht.PrefixTuning(3, bottleneck=None))
    )
    spread(attachment)
    expected, state = logits(model), attachment.state_dict()
    joined = {name: value for name, value in state.items() if ".prefix_2." not in name}
    for name in joined:
        if ".prefix." in name:
            joined[name] = torch.cat([state[name], state[name.replace(".prefix.", ".prefix_2.")]])
    attachment.detach()
    one = ht.attach(model, ht.PrefixTuning(5, bottleneck=None))
    spread(one)
    one.load_state_dict(joined)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_a_loaded_prefix_is_folded_and_trains_on() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.PrefixTuning(length=3, bottleneck=8, layers=(0, 1)))
    shake(attachment)
    expected, state = logits(model), attachment.stored_state()
    attachment.load_state_dict(attachment.state_dict())
    assert "adapter.prefix_network.embedding" in attachment.named_parameters(), "the same form: nothing folds"
    attachment.load_state_dict({name: value for name, value in state.items() if "layers.0" in name})
    assert "adapter.prefix_network.embedding" in attachment.named_parameters(), "layer 1 still needs it"
    attachment.load_state_dict(state)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    counts = attachment.count().loc["adapter"]
    assert counts.tolist() == [2 * 2 * 3 * 16] * 3
    model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.parameters("adapter"))


def test_a_frozen_prefix_stays_frozen_when_it_folds() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.PrefixTuning(length=3, bottleneck=8))
    attachment.train_only("head")
    attachment.load_state_dict(attachment.stored_state())
    assert attachment.count()["trained"].to_dict() == {"adapter": 0, "norm": 0, "gate": 0, "head": 34}


def test_the_prefix_of_llama_has_the_width_of_its_keys() -> None:
    attachment = ht.attach(tiny_model("llama"), ht.PrefixTuning(length=3))
    assert attachment.stored_state()["adapter.layers.0.prefix.key"].shape == (3, 8)


def test_attentions_come_out_with_the_prefix_in_front() -> None:
    for architecture in ("bert", "mpnet", "deberta-v2"):
        model = tiny_model(architecture)
        model.set_attn_implementation("eager")
        ht.attach(model, ht.PrefixTuning(length=3))
        attentions = model(**tiny_batch(), output_attentions=True).attentions
        assert attentions[0].shape == (3, 2, 9, 12)
        torch.testing.assert_close(attentions[0].sum(-1), torch.ones(3, 2, 9))


def test_same_seed_same_prefix() -> None:
    states = [ht.attach(tiny_model("bert"), ht.PrefixTuning(), seed=seed).state_dict() for seed in (1, 1, 2)]
    name = "adapter.layers.0.prefix.up.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_what_cannot_carry_a_prefix_is_refused_by_name() -> None:
    model = tiny_model("deberta", talking_head=True)
    with pytest.raises(UnsupportedError, match="deberta with talking heads"):
        ht.attach(model, ht.PrefixTuning())
    assert not hasattr(model, "hadamard_attachment")

    model = tiny_model("bert")
    del model.bert.encoder.layer[1].attention.self.config
    with pytest.raises(
        UnsupportedError, match=r"BertSelfAttention of architecture 'bert'.*attention interface"
    ):
        ht.attach(model, ht.PrefixTuning())
    assert "hadamard_prefixes" not in vars(model.bert.encoder.layer[0].attention.self)

    model = tiny_model("bert")
    ht.attach(model, ht.PrefixTuning())
    model.set_attn_implementation("flex_attention")
    host = model.bert.encoder.layer[0].attention.self
    with pytest.raises(UnsupportedError, match="attn_implementation='flex_attention' cannot carry prefixes"):
        host(torch.zeros(1, 4, 16))


def test_flash_attention_gets_masks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: dict[str, Any] = {}

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen.update(mask=mask, keys=key.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = tiny_model("bert")
    ht.attach(model, ht.PrefixTuning(length=3))
    model.config._attn_implementation = "flash_attention_2"
    host = model.bert.encoder.layer[0].attention.self
    host(torch.zeros(1, 4, 16), torch.tensor([[1, 1, 1, 0]]))
    assert seen["mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0]]
    host(torch.zeros(1, 4, 16))
    assert seen["mask"] is None
    assert seen["keys"] == 7
    with pytest.raises(UnsupportedError, match="sliding window"):
        host(torch.zeros(1, 4, 16), sliding_window=3)


def test_description_round_trips() -> None:
    check_json(ht.PrefixTuning(length=3, bottleneck=None, gated="masked", layers=(1, 2)))


def test_another_model_of_the_same_config_is_not_touched() -> None:
    config = tiny_config("bert")
    one, other = (ht.backbone_from_config(config, seed=0).eval() for _ in range(2))
    before = logits(other)
    spread(ht.attach(copy.deepcopy(one).double(), ht.PrefixTuning()))
    ht.attach(one, ht.PrefixTuning())
    assert torch.equal(logits(other), before)
