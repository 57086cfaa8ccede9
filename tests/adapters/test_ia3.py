"""(IA)³: its formula by hand, stock peft's logits and gradients, merging rows, biases and columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.ia3 import TARGETS
from hadamard_toolkit.errors import ArgumentError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.test_attachment import logits, shake
from tests.architectures import tiny_batch, tiny_model


def test_formula() -> None:
    def by_hand(own: dict[str, Tensor], weights: dict[str, Tensor]) -> Changes:
        def scale(target: str) -> object:
            return lambda layer, h, x: own[f"adapter.layers.{layer}.{target}.weight"] * h

        return {target: scale(target) for target in ("key", "value", "ffn_hidden")}  # type: ignore[misc]

    check_against(ht.IA3(), by_hand)


def test_before_w_o_it_is_the_hadamard_adapter_without_its_bias() -> None:
    ours = ht.attach(tiny_model("bert"), ht.IA3(targets=("attention_heads",)))
    theirs = ht.attach(
        tiny_model("bert"), ht.Hadamard(placement="attention_heads", vectors=("weight",), norm=None)
    )
    shake(ours)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours.model), logits(theirs.model))


def test_counts_and_keys() -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    counts = ht.attach(model, ht.IA3()).count()
    assert counts.loc["adapter"].to_dict() == dict.fromkeys(("trained", "stored", "nonzero"), 55_296)
    assert counts.loc[["norm", "gate"]].to_numpy().sum() == 0
    attachment = ht.attach(tiny_model("bert"), ht.IA3(layers=(1,)))
    expected = {f"adapter.layers.1.{target}.weight" for target in ("key", "value", "ffn_hidden")}
    assert set(attachment.state_dict()) == expected | {"head.classifier.weight", "head.classifier.bias"}
    assert set(attachment.vectors()) == {"key.weight", "value.weight", "ffn_hidden.weight"}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_merge_error_by_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model("bert").to(dtype)
    attachment = ht.attach(model, ht.IA3(targets=TARGETS))
    shake(attachment)
    expected = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)


def test_merging_scales_the_biases_of_keys_and_values_and_the_columns_behind_the_activations() -> None:
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attachment = ht.attach(model, ht.IA3(layers=(0,)))
    shake(attachment)
    own = attachment.state_dict()
    scale = torch.cat(
        [torch.ones(16), *(own[f"adapter.layers.0.{target}.weight"] for target in ("key", "value"))]
    )
    merged = attachment.merge().state_dict()
    for name in ("weight", "bias"):  # gpt2 stores [in, out]
        fused = f"transformer.h.0.attn.c_attn.{name}"
        torch.testing.assert_close(merged[fused], before[fused] * scale)
    second = "transformer.h.0.mlp.c_proj"
    columns = own["adapter.layers.0.ffn_hidden.weight"][:, None]
    torch.testing.assert_close(merged[f"{second}.weight"], before[f"{second}.weight"] * columns)
    assert torch.equal(merged[f"{second}.bias"], before[f"{second}.bias"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_stock_peft_has_the_same_logits_and_gradients() -> None:
    peft = pytest.importorskip("peft")
    second = [f"bert.encoder.layer.{i}.output.dense" for i in range(3)]
    config = peft.IA3Config(target_modules=["key", "value", *second], feedforward_modules=second)
    theirs = peft.get_peft_model(tiny_model("bert"), config).eval()
    ours = tiny_model("bert")
    attachment = ht.attach(ours, ht.IA3())
    attachment.train_only("adapter")
    shake(attachment)
    pairs = []
    for name, parameter in attachment.named_parameters("adapter").items():
        _, _, layer, target, _ = name.split(".")
        path = {"ffn_hidden": "output.dense"}.get(target, f"attention.self.{target}")
        twin = theirs.get_parameter(f"base_model.model.bert.encoder.layer.{layer}.{path}.ia3_l.default")
        twin.data.copy_(parameter.data.reshape(twin.shape))
        pairs.append((parameter, twin))
    theirs.base_model.model.classifier.load_state_dict(ours.classifier.state_dict())
    labels = torch.tensor([0, 1, 0])
    mine, other = (model(**tiny_batch(), labels=labels) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    for parameter, twin in pairs:
        torch.testing.assert_close(parameter.grad, twin.grad.flatten(), rtol=0, atol=1e-6)


def test_bad_fields() -> None:
    with pytest.raises(ArgumentError, match="targets='ffn' is not allowed; choose one of 'query', 'key'"):
        ht.IA3(targets=("key", "ffn"))
    with pytest.raises(ArgumentError, match="not a layer of this model"):
        ht.attach(tiny_model("bert"), ht.IA3(layers=(9,)))
