"""The Hadamard adapter: its formula and the identities that tie it to (IA)³, BitFit and LayerNorm tuning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.hadamard import IDENTITY, HadamardVectors
from hadamard_toolkit.errors import ArgumentError
from tests.architectures import tiny_batch, tiny_model


def float64_bert() -> PreTrainedModel:
    return tiny_model("bert").double()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def attach_random(model: PreTrainedModel, adapter: ht.Hadamard, seed: int = 0) -> ht.Attachment:
    attachment = ht.attach(model, adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters("adapter"):
            parameter.data = (
                parameter.double() + 0.3 * torch.randn(parameter.shape, generator=generator).double()
            )
    return attachment


def own(attachment: ht.Attachment, layer: int, vector: str) -> Tensor:
    site = attachment.adapter.placement  # type: ignore[attr-defined]
    return attachment.named_parameters("adapter")[f"adapter.layers.{layer}.{site}.{vector}"].detach().clone()


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([("weight", "bias"), ("weight",), ("bias",)]))
def test_formula(width: int, rows: int, vectors: tuple[str, ...]) -> None:
    module = HadamardVectors(width, vectors)
    hidden = torch.randn(rows, 3, width)
    assert torch.equal(module(hidden, hidden), hidden), "W = 1, b = 0 is the identity"
    weight, bias = torch.ones(width), torch.zeros(width)
    if "weight" in vectors:
        weight = torch.randn(width)
        module.weight.data = weight
    if "bias" in vectors:
        bias = torch.randn(width)
        module.bias.data = bias
    by_hand = torch.tensor(
        [
            [[float(weight[j] * hidden[i, t, j] + bias[j]) for j in range(width)] for t in range(3)]
            for i in range(rows)
        ]
    )
    torch.testing.assert_close(module(hidden, hidden).detach(), by_hand)


def test_before_w_o_the_weight_is_the_value_scaling_of_ia3_and_the_bias_the_value_bias_of_bitfit() -> None:
    model = float64_bert()
    attachment = attach_random(model, ht.Hadamard(placement="attention_heads", norm=None))
    expected = logits(model)
    vectors = [(own(attachment, i, "weight"), own(attachment, i, "bias")) for i in range(3)]
    attachment.detach()
    for layer, (weight, bias) in zip(model.bert.encoder.layer, vectors, strict=True):
        value = layer.attention.self.value
        # W ⊙ (P V) + b = P (W ⊙ V + b), as the rows of P sum to one
        value.weight.data = weight[:, None] * value.weight.data
        value.bias.data = weight * value.bias.data + bias
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_after_w_o_it_scales_the_rows_of_w_o_and_its_bias_is_that_of_bitfit() -> None:
    model = float64_bert()
    attachment = attach_random(model, ht.Hadamard(norm=None))
    expected = logits(model)
    vectors = [(own(attachment, i, "weight"), own(attachment, i, "bias")) for i in range(3)]
    attachment.detach()
    for layer, (weight, bias) in zip(model.bert.encoder.layer, vectors, strict=True):
        dense = layer.attention.output.dense
        dense.weight.data = weight[:, None] * dense.weight.data
        dense.bias.data = weight * dense.bias.data + bias
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_after_the_norm_it_would_be_redundant_with_the_norm() -> None:
    norm = tiny_model("bert").double().bert.encoder.layer[0].attention.output.LayerNorm
    vectors = HadamardVectors(16, ("weight", "bias")).double()
    vectors.weight.data, vectors.bias.data = torch.randn(16).double(), torch.randn(16).double()
    hidden = torch.randn(5, 16).double()
    after = vectors(norm(hidden), hidden).detach()
    norm.weight.data, norm.bias.data = (
        vectors.weight * norm.weight.data,
        vectors.weight * norm.bias.data + vectors.bias,
    )
    torch.testing.assert_close(norm(hidden).detach(), after.detach(), rtol=0, atol=1e-12)


def test_a_constant_added_to_b_changes_nothing_behind_a_post_norm() -> None:
    model = float64_bert()
    attachment = attach_random(model, ht.Hadamard(norm=None))
    expected = logits(model)
    for name, parameter in attachment.named_parameters("adapter").items():
        if name.endswith("bias"):
            parameter.data += 1.7
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("placement", ["attention_output", "attention_heads"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_merge_error_by_dtype(placement: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model("bert").to(dtype)
    attachment = attach_random(model, ht.Hadamard(placement=placement))
    expected = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)


def test_the_vectors_start_at_the_identity() -> None:
    vectors = ht.attach(tiny_model("bert"), ht.Hadamard(norm=None)).vectors()
    assert {name.rpartition(".")[2]: set(array.ravel()) for name, array in vectors.items()} == {
        name: {value} for name, value in IDENTITY.items()
    }


def test_vectors_have_one_order() -> None:
    assert ht.Hadamard(vectors=("bias", "weight")) == ht.Hadamard(vectors=("weight", "bias")) == ht.Hadamard()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "value"}, "placement='value' is not allowed.*'attention_output', 'attention_heads'"),
        ({"norm": "ffn"}, "norm='ffn' is not allowed"),
        ({"vectors": ("scale",)}, "vectors='scale' is not allowed"),
        ({"vectors": "weight"}, "give a tuple"),
        ({"vectors": (), "norm": None}, "leaves nothing to train"),
        ({"layers": 3}, "layers=3 is not allowed"),
        ({"layers": "most"}, "layers='most' is not allowed"),
        ({"layers": (1.5,)}, "1.5 is not the index of a layer"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.Hadamard(**fields)  # type: ignore[arg-type]


def test_norm_alone_is_layernorm_tuning() -> None:
    ours = ht.attach(tiny_model("bert"), ht.Hadamard(vectors=(), norm="attention"))
    theirs = ht.attach(tiny_model("bert"), ht.LayerNormTuning("attention"))
    assert set(ours.state_dict()) == set(theirs.state_dict())
