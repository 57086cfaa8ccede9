"""LoRA: its formula by hand, stock peft's logits and gradients, merging in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.lora import TARGETS, LowRank
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_batch, tiny_model

Weights = dict[str, Tensor]


def test_formula_at_every_target() -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(target: str, layer: int, h: Tensor, x: Tensor) -> Tensor:
            a, b = (own[f"adapter.layers.{layer}.{target}.{name}"] for name in "AB")
            return h + (12 / 3) * (x @ a.T @ b.T)

        return {target: lambda i, h, x, target=target: at(target, i, h, x) for target in TARGETS}  # type: ignore[misc]

    check_against(ht.LoRA(rank=3, alpha=12, targets=TARGETS), by_hand)


@pytest.mark.parametrize("gated", ["original", "masked"])
def test_gates_take_the_place_of_the_scale_one_for_each_target(gated: str) -> None:
    real = tiny_batch()["attention_mask"].double()
    counted = real if gated == "masked" else torch.ones_like(real)

    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(target: str, layer: int, h: Tensor, x: Tensor) -> Tensor:
            name = f"layers.{layer}.{target}"
            a, b = own[f"adapter.{name}.A"], own[f"adapter.{name}.B"]
            opening = torch.sigmoid(x @ own[f"gate.{name}.gate.weight"] + own[f"gate.{name}.gate.bias"])
            gate = (opening * counted).sum(1) / counted.sum(1)
            return h + gate[:, None, None] * (x @ a.T @ b.T)

        return {target: lambda i, h, x, target=target: at(target, i, h, x) for target in ("query", "value")}  # type: ignore[misc]

    check_against(ht.LoRA(rank=3, alpha=5, gated=gated), by_hand)


def test_counts_of_bert_base() -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    attachment = ht.attach(model, ht.LoRA())
    assert attachment.count().loc["adapter"].to_dict() == dict.fromkeys(
        ("trained", "stored", "nonzero"), 294_912
    )
    attachment.detach()
    gated = ht.attach(model, ht.LoRA(gated="original")).count()["trained"]
    assert (gated["adapter"], gated["gate"], gated["norm"]) == (294_912, 24 * 769, 0)


def test_exact_key_sets() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(rank=2, layers=(0, 2), gated="masked"))
    sites = [f"layers.{i}.{target}" for i in (0, 2) for target in ("query", "value")]
    expected = {f"adapter.{site}.{name}" for site in sites for name in "AB"}
    expected |= {f"gate.{site}.gate.{name}" for site in sites for name in ("weight", "bias")}
    assert set(attachment.state_dict()) == expected | {"head.classifier.weight", "head.classifier.bias"}
    assert LowRank.projections == ("A", "B")


def test_initial_values_and_what_they_hide_from_the_loss() -> None:
    for init, hidden in (("zero", True), ("normal", False)):
        model = tiny_model("bert")
        attachment = ht.attach(model, ht.LoRA(rank=4, init=init))
        own = attachment.named_parameters("adapter")
        a, b = (torch.stack([p.detach() for n, p in own.items() if n.endswith(name)]) for name in "AB")
        if init == "zero":
            assert not b.any()
            assert 0.2 < a.abs().max() <= 16**-0.5, "uniform within 1/sqrt(in)"
        else:
            assert 0.016 < a.std() < 0.024
            assert 0.016 < b.std() < 0.024
        model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        gradients = [p.grad for n, p in own.items() if n.endswith("A") and p.grad is not None]
        assert len(gradients) == 6
        assert all((not gradient.any()) == hidden for gradient in gradients)


def test_the_same_seed_gives_the_same_factors() -> None:
    one, two, other = (ht.attach(tiny_model("bert"), ht.LoRA(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["adapter.layers.0.query.A"], other["adapter.layers.0.query.A"])


def test_dropout_works_in_training_only() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attachment = ht.attach(model, ht.LoRA(dropout=0.5))
    shake(attachment)
    assert torch.equal(logits(model), logits(model)), "attached to a model in eval mode, it is in eval mode"
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_merge_error_by_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model("bert").to(dtype)
    attachment = ht.attach(model, ht.LoRA(targets=TARGETS))
    shake(attachment)
    expected = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["gpt2", "modernbert", "deberta"])
def test_in_a_fused_projection_only_the_rows_of_the_target_change(architecture: str) -> None:
    model = tiny_model(architecture)
    attachment = ht.attach(model, ht.LoRA(targets=("value",)))
    shake(attachment)
    value, query = attachment.sites(1, "value"), attachment.sites(1, "query")
    fused = value.module.weight.detach().clone()
    attachment.merge()
    matrix = value.module.weight if architecture != "gpt2" else value.module.weight.T
    changed = (matrix != (fused if architecture != "gpt2" else fused.T)).any(1)
    assert changed[value.rows].all()
    assert not changed[query.rows].any()
    assert int(changed.sum()) == 16


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_stock_peft_has_the_same_logits_and_gradients() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        tiny_model("bert"),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value", "intermediate.dense"]),
    ).eval()
    ours = tiny_model("bert")
    attachment = ht.attach(ours, ht.LoRA(rank=3, alpha=6, targets=("query", "value", "ffn_inner")))
    attachment.train_only("adapter")
    shake(attachment)
    for name, parameter in attachment.named_parameters("adapter").items():
        _, _, layer, target, factor = name.split(".")
        path = {"ffn_inner": "intermediate.dense"}.get(target, f"attention.self.{target}")
        twin = theirs.get_parameter(
            f"base_model.model.bert.encoder.layer.{layer}.{path}.lora_{factor}.default.weight"
        )
        twin.data.copy_(parameter.data)
        parameter.twin = twin  # type: ignore[attr-defined]
    theirs.base_model.model.classifier.load_state_dict(ours.classifier.state_dict())
    labels = torch.tensor([0, 1, 0])
    mine, other = (model(**tiny_batch(), labels=labels) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    for name, parameter in attachment.named_parameters("adapter").items():
        torch.testing.assert_close(parameter.grad, parameter.twin.grad, rtol=0, atol=1e-6, msg=name)  # type: ignore[attr-defined]


def test_a_gated_one_does_not_merge() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(gated="original"))
    with pytest.raises(UnsupportedError, match=r"gated LoRA at query.*cannot be merged"):
        attachment.merge()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("q",)}, "targets='q' is not allowed; choose one of 'query', 'key'"),
        ({"init": "bert"}, "init='bert' is not allowed; choose one of 'zero', 'normal'"),
        ({"gated": True}, "gated=True is not allowed; choose one of None, 'original', 'masked'"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.LoRA(**fields)  # type: ignore[arg-type]


def test_targets_have_one_order() -> None:
    assert ht.LoRA(targets=("value", "query", "value")) == ht.LoRA()
