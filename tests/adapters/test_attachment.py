"""The life of an attachment on every architecture: identity, gradients, merge, save, detach."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model

METHODS: dict[str, Adapter] = {
    "hadamard": ht.Hadamard(),
    "hadamard-heads-both": ht.Hadamard(placement="attention_heads", norm="both"),
    "weight-only": ht.Hadamard(vectors=("weight",), norm=None),
    "bias-only": ht.Hadamard(vectors=("bias",), norm=None),
    "norm": ht.LayerNormTuning(norm="both"),
    "full": ht.FullFineTuning(),
    "head": ht.HeadOnly(),
    "lora": ht.LoRA(
        rank=3, targets=("query", "key", "value", "attention_output", "ffn_inner", "ffn_output"), dropout=0.1
    ),
    "lora-gated": ht.LoRA(rank=3, gated="masked"),
    "ia3": ht.IA3(),
    "houlsby": ht.Houlsby(bottleneck=4),
    "pfeiffer-gated": ht.Pfeiffer(bottleneck=4, gated="original", dropout=0.1),
    "parallel": ht.ParallelAdapter(bottleneck=8, scale=4.0),
    "stack": ht.Stack(
        ht.LoRA(rank=2, targets=("value", "attention_output")), ht.IA3(), ht.Hadamard(), ht.LoRA(rank=1)
    ),
}
NOT_LINEAR = ("lora-gated", "houlsby", "pfeiffer-gated", "parallel")  # these cannot be merged


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def shake(attachment: ht.Attachment, seed: int = 1) -> None:
    """Move every parameter of the attachment, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_life_of_an_attachment(architecture: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    attachment = ht.attach(model, METHODS[method])
    assert torch.equal(logits(model), before), "identity at initialisation"

    shake(attachment)  # at its identity, LoRA's B = 0 hides A from the loss
    labels = torch.tensor([0, 1, 0])
    loss = model(**tiny_batch(), labels=labels).loss
    loss.backward()
    ours = {id(p) for p in attachment.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in ours) == parameter.requires_grad, name
        assert id(parameter) in ours or parameter.grad is None, name
    reached = [p for p in attachment.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    if (
        method != "full"
    ):  # a whole backbone holds parameters that no classifier reads, such as unused embeddings
        assert len(reached) == len(attachment.parameters())

    with torch.no_grad():
        for parameter in reached:
            parameter -= 1e-3 * parameter.grad
        assert model(**tiny_batch(), labels=labels).loss < loss, "a step lowers the loss"
    trained = logits(model)
    assert not torch.allclose(trained, before)
    with attachment.enabled(False):
        head = {n: p.detach().clone() for n, p in attachment.named_parameters("head").items()}
        silent = logits(model)
    assert torch.equal(logits(model), trained), "enabled(False) undoes itself"

    attachment.save(tmp_path / "saved")
    if method in NOT_LINEAR:
        with pytest.raises(UnsupportedError, match="cannot be merged"):
            attachment.merge()
        assert torch.equal(logits(model), trained), "a refused merge changes nothing"
    else:
        attachment.merge(allow_new_biases=True)
        assert torch.allclose(logits(model), trained, atol=1e-5), "merged = unmerged"
        assert not hasattr(model, "hadamard_attachment")

    attachment.detach()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    reloaded = ht.load_attachment(model, tmp_path / "saved")
    assert torch.equal(logits(model), trained), "save and reload"
    with reloaded.enabled(False):
        assert torch.equal(logits(model), silent)
        assert all(torch.equal(p, head[n]) for n, p in reloaded.named_parameters("head").items())
    reloaded.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5"])
def test_detach_without_merge_restores(architecture: str) -> None:
    model = tiny_model(architecture)
    weights = copy.deepcopy(model.state_dict())
    attachment = ht.attach(model, ht.Hadamard(norm="both"))
    shake(attachment)
    attachment.detach()
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_exact_key_sets(tmp_path: Path) -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard(layers=(0, 2)))
    expected = {f"adapter.layers.{i}.attention_output.{v}" for i in (0, 2) for v in ("weight", "bias")}
    expected |= {f"norm.layers.{i}.attention_norm.{v}" for i in (0, 2) for v in ("weight", "bias")}
    expected |= {"head.classifier.weight", "head.classifier.bias"}
    assert set(attachment.state_dict()) == expected
    attachment.save(tmp_path / "run")
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_saving_into_a_folder_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    ht.attach(tiny_model("bert"), ht.Hadamard()).save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "note.txt",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_enabled_off_for_some_layers_only() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    with attachment.enabled(False, layers=(1,)):
        without_one = logits(model)
        state = {k: v for k, v in attachment.state_dict().items() if ".1." not in k}
    fewer = ht.attach(tiny_model("bert"), ht.Hadamard(layers=(0, 2)))
    fewer.load_state_dict(state)
    assert torch.equal(logits(fewer.model), without_one)


def test_enabled_restores_after_an_error() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    trained = logits(model)
    with pytest.raises(RuntimeError, match="inside"), attachment.enabled(False):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), trained)


def test_a_deep_copy_is_independent() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Hadamard())
    twin = copy.deepcopy(model)
    shake(attachment)
    assert not torch.allclose(logits(model), logits(twin))


def test_vectors_line_up_by_layer() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard(layers=(0, 2)))
    vectors = attachment.vectors()
    assert set(vectors) == {f"attention_output.{v}" for v in ("weight", "bias")} | {
        f"attention_norm.{v}" for v in ("weight", "bias")
    }
    weight = vectors["attention_output.weight"]
    assert weight.shape == (3, 16)
    assert (weight[[0, 2]] == 1).all()
    assert (weight[1] != weight[1]).all(), "NaN where the layer carries none"


def test_albert_has_vectors_for_every_depth_step_and_one_norm() -> None:
    attachment = ht.attach(tiny_model("albert"), ht.Hadamard())
    assert len(attachment.parameters("adapter")) == 2 * 3
    assert len(attachment.parameters("norm")) == 2
    shake(attachment)
    weights = attachment.vectors()["attention_output.weight"]
    assert not (weights[0] == weights[1]).all()


def test_merged_bias_survives_where_the_projection_had_none() -> None:
    model = tiny_model("llama")
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    attachment.merge()
    assert model.model.layers[0].self_attn.o_proj.bias is not None
    attachment.detach()
    assert model.model.layers[0].self_attn.o_proj.bias is None


def test_train_only_switches_roles() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard())
    attachment.train_only("head")
    assert attachment.count()["trained"].to_dict() == {"adapter": 0, "norm": 0, "gate": 0, "head": 34}
    attachment.train_only("adapter", "norm")
    assert attachment.count()["trained"].to_dict() == {"adapter": 96, "norm": 96, "gate": 0, "head": 0}
    assert attachment.count()["stored"].to_dict() == {"adapter": 96, "norm": 96, "gate": 0, "head": 34}


@pytest.mark.parametrize("adapter", METHODS.values())
def test_adapters_round_trip_through_json(adapter: Adapter) -> None:
    assert adapter_from_dict(json.loads(json.dumps(adapter_to_dict(adapter)))) == adapter
    hash(adapter)


def test_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("bert")
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"layers=\(0, 7\).*7 is not a layer.*0 to 2"):
        ht.attach(model, ht.Hadamard(layers=(0, 7)))
    with pytest.raises(ArgumentError, match="adapter='Hadamard' is not an adapter"):
        ht.attach(model, "Hadamard")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="holds no saved attachment"):
        ht.load_attachment(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DataError, match="stock peft"):
        ht.load_attachment(model, tmp_path)
    assert list(model.state_dict()) == list(weights), "a refused attach leaves no trace"

    attachment = ht.attach(model, ht.Hadamard())
    with pytest.raises(ArgumentError, match="already carries"):
        ht.attach(model, ht.Hadamard())
    with pytest.raises(ArgumentError, match="role='bias'"):
        attachment.parameters("bias")
    with pytest.raises(DataError, match="shape"):
        attachment.load_state_dict({"head.classifier.bias": torch.zeros(5)})
    with pytest.raises(DataError, match="not a parameter"):
        attachment.load_state_dict({"head.other": torch.zeros(5)})


def test_another_backbone_is_refused_unless_asked_for(tmp_path: Path) -> None:
    ht.attach(tiny_model("bert", seed=0), ht.Hadamard()).save(tmp_path / "saved")
    other = tiny_model("bert", seed=1)
    with pytest.raises(DataError, match="another backbone"):
        ht.load_attachment(other, tmp_path / "saved")
    assert not hasattr(other, "hadamard_attachment")
    ht.load_attachment(other, tmp_path / "saved", strict=False)


def test_an_unknown_architecture_learns_how_to_write_its_table() -> None:
    model = tiny_model("bert")
    model.config.model_type = "novel"
    with pytest.raises(UnsupportedError, match=r"ARCHITECTURES\['novel'\] = \(LayerTable"):
        ht.attach(model, ht.Hadamard())


def test_bitfit_needs_biases() -> None:
    with pytest.raises(UnsupportedError, match="llama backbone has none"):
        ht.attach(tiny_model("llama"), ht.BitFit())


BERT_BASE = [
    (ht.Hadamard(), 36_864),
    (ht.Hadamard(layers=(0, 1, 2, 3, 4, 5, 6, 7)), 24_576),
    (ht.Hadamard(norm=None), 18_432),
    (ht.Hadamard(norm="both"), 55_296),
    (ht.Hadamard(placement="attention_heads", norm=None), 18_432),
    (ht.LayerNormTuning(), 18_432),
    (ht.LayerNormTuning(norm="both"), 36_864),
    (ht.BitFit(), 102_912),
    (ht.HeadOnly(), 0),
    (ht.FullFineTuning(), 109_482_240),
]


@pytest.mark.parametrize(("adapter", "expected"), BERT_BASE)
def test_parameter_counts_of_bert_base(adapter: Adapter, expected: int) -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    counts = ht.attach(model, adapter).count()
    without_head = counts.drop(index="head").sum()
    assert without_head.to_dict() == {"trained": expected, "stored": expected, "nonzero": expected}
    assert counts.loc["head", "trained"] == 2 * 768 + 2


def test_a_detached_attachment_says_so(tmp_path: Path) -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Hadamard())
    attachment.detach()
    other = ht.attach(model, ht.LoRA())
    shake(other)
    trained = logits(model)
    for attempt in (
        attachment.detach,
        attachment.merge,
        attachment.state_dict,
        attachment.stored_state,
        attachment.parameters,
        attachment.count,
        attachment.vectors,
        lambda: attachment.save(tmp_path / "saved"),
        lambda: attachment.load_state_dict({}),
        lambda: attachment.train_only("head"),
        lambda: attachment.mask({}, {}),
        lambda: attachment.name_labels(("a", "b")),
        lambda: attachment.enabled(False).__enter__(),
    ):
        with pytest.raises(ArgumentError, match=r"attachment of Hadamard\(.* is detached"):
            attempt()
    assert torch.equal(logits(model), trained), "what is attached now stays"
    assert not (tmp_path / "saved").exists()


def test_a_merged_attachment_is_not_saved(tmp_path: Path) -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard())
    attachment.merge()
    with pytest.raises(ArgumentError, match=r"is merged, .*save\(\) before merge\(\).*save_pretrained\(\)"):
        attachment.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    attachment.detach()
    with pytest.raises(ArgumentError, match="is detached"):
        attachment.detach()


def test_the_longest_input() -> None:
    assert ht.attach(tiny_model("bert"), ht.Hadamard()).longest_input() == 40
    assert ht.attach(tiny_model("roberta"), ht.PromptTuning(length=4)).longest_input() == 35
    two = ht.Stack(ht.PromptTuning(length=4), ht.PromptTuning(length=3))
    assert ht.attach(tiny_model("bert"), two).longest_input() == 33
    assert ht.attach(tiny_model("t5"), ht.PromptTuning(length=4)).longest_input() is None
