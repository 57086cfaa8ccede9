"""Backbones: pinned, local and from a config; seeds, heads, refusals. The hub's road is in test_hub.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import logging as transformers_logging

import hadamard_toolkit as ht
from hadamard_toolkit.backbones import (
    HEADS,
    _quiet,
    backbone_from_config,
    backbone_provenance,
    load_backbone,
    seeded,
)
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config
from tests.training.tiny import tiny_tokenizer

NO_MASKED_LM = {"t5", "gpt2", "llama"}
Minilm = Callable[..., tuple[Any, Any]]


@pytest.fixture
def folder(tmp_path: Path, minilm: Minilm) -> Path:
    """A local folder with a tiny encoder and MiniLM's tokenizer."""
    target = tmp_path / "tiny"
    config = tiny_config("bert", vocab_size=30522)
    backbone_from_config(config, head="masked-lm").save_pretrained(target)
    minilm()[1].save_pretrained(target)
    return target


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- pinned ---


def test_minilm_is_a_plain_quiet_model(minilm: Minilm, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = minilm(labels=3)
    assert capfd.readouterr() == ("", "")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    batch = tokenizer(["good", "a much longer text"], ["pair", "pair"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.shape == (2, 3)


def test_the_seed_fixes_the_head_and_nothing_else(minilm: Minilm) -> None:
    one, same, other = (minilm(seed=seed)[0] for seed in (1, 1, 2))
    assert _equal(one, same)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert _equal(one.base_model, other.base_model)
    assert 0.01 < one.classifier.weight.std() < 0.03  # the architecture's own initialisation, not zeros


def test_no_random_state_is_used_or_changed(minilm: Minilm) -> None:
    def state() -> list[str]:
        return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state())]  # noqa: NPY002

    before = state()
    first = minilm(seed=3)[0]
    assert state() == before
    torch.manual_seed(99)
    assert _equal(first, minilm(seed=3)[0])


@pytest.mark.parametrize(("head", "kind", "outputs"), [("regression", "regression", 1), ("span", None, 2)])
def test_heads_of_a_pinned_backbone(minilm: Minilm, head: str, kind: str | None, outputs: int) -> None:
    config = minilm(head=head)[0].config
    assert (config.problem_type, config.num_labels) == (kind, outputs)


# --- local folders ---


def test_a_local_folder_loads_with_its_weights(folder: Path) -> None:
    model, tokenizer = load_backbone(str(folder), labels=4)
    stored = load_file(folder / "model.safetensors")
    key = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.state_dict()[key], stored[key])
    assert model.classifier.out_features == 4
    assert tokenizer("good")["input_ids"][0] == tokenizer.cls_token_id
    record = backbone_provenance(str(folder))
    assert (record["name"], record["source"]) == ("tiny", "local folder")
    assert set(record["sha256"]) == {"model.safetensors"}


def test_a_stored_head_is_replaced_by_a_fresh_one(folder: Path) -> None:
    plain, _ = load_backbone(str(folder), labels=3, seed=5)
    stored, tokenizer = load_backbone(str(folder), labels=3, seed=5)
    with torch.no_grad():
        stored.classifier.weight.fill_(7)
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for labels in (3, 2):  # also with another number of labels
        first, _ = load_backbone(str(folder), labels=labels, seed=5)
        again, _ = load_backbone(str(folder), labels=labels, seed=5)
        other, _ = load_backbone(str(folder), labels=labels, seed=6)
        assert not (first.classifier.weight == 7).any()
        assert torch.equal(first.classifier.weight, again.classifier.weight)
        assert not torch.equal(first.classifier.weight, other.classifier.weight)
        assert torch.equal(
            first.bert.embeddings.word_embeddings.weight, plain.bert.embeddings.word_embeddings.weight
        )


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no backbone.*safetensors.*never unpickled"):
        load_backbone(str(folder))


@pytest.mark.parametrize(("head", "name"), [("regression", "classifier"), ("span", "qa_outputs")])
def test_a_stored_head_for_scores_or_spans_is_replaced_too(folder: Path, head: str, name: str) -> None:
    trained, tokenizer = load_backbone(str(folder), head=head, seed=5)
    with torch.no_grad():
        trained.get_parameter(f"{name}.weight").fill_(7)
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first, again, other = (
        load_backbone(str(folder), head=head, seed=seed)[0].get_parameter(f"{name}.weight")
        for seed in (5, 5, 6)
    )
    assert not (first == 7).any()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lost_backbone_weights_are_no_fresh_head(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file(
        {key: value for key, value in stored.items() if key != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(DataError, match=rf"lacks 1 weights of its architecture, the first '{lost}'"):
        load_backbone(str(folder))


def test_truncated_weights_are_one_clear_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_backbone(str(folder))


def test_an_unknown_name_lists_the_pinned_ones() -> None:
    with pytest.raises(
        ArgumentError, match=r"'minilm-l6', 'mpnet-base'\), no local folder, and no hub id within reach"
    ):
        load_backbone("someone/nothing-here")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("minilm", "minilm-l6"),
        ("MiniLM-L6", "minilm-l6"),
        ("minilm_l6", "minilm-l6"),
        ("mpnet", "mpnet-base"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm-l6"),
    ],
)
def test_a_near_miss_of_a_pinned_name_is_told(name: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=f"name='{name}' is not allowed.* Did you mean '{meant}'"):
        load_backbone(name)


# --- what is saved beside the backbone, or in the wrong place ---


def save_with(model: torch.nn.Module, folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """Save a model and its tokenizer, with further tensors among its own."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(load_file(path) | extra, path, {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_backbone_loads_from_every_head_it_was_saved_with(architecture: str, tmp_path: Path) -> None:
    config = tiny_config(architecture, eos_token_id=2)
    savers = (
        AutoModel,
        AutoModelForPreTraining,
        AutoModelForMaskedLM,
        AutoModelForCausalLM,
        AutoModelForTokenClassification,
        AutoModelForSequenceClassification,
    )
    if architecture in ("bart", "t5"):  # these two heads keep one half of the backbone
        savers = tuple(set(savers) - {AutoModelForCausalLM, AutoModelForTokenClassification})
    for number, saver in enumerate(savers):
        if type(config) in saver._model_mapping:
            save_with(saver.from_config(config), tmp_path / str(number), {})
            model, _ = load_backbone(str(tmp_path / str(number)), labels=3)
            assert model.config.num_labels == 3


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("bert", ["bert.embeddings.position_ids", "cls.seq_relationship.weight"]),
        ("roberta", ["roberta.embeddings.token_type_ids", "roberta.pooler.dense.weight"]),
        ("deberta-v2", ["mask_predictions.dense.weight", "lm_predictions.lm_head.bias"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("bart", ["model.encoder.version", "model.decoder.version", "final_logits_bias"]),
        ("t5", ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
    ],
)
def test_what_older_versions_kept_among_the_weights_is_left_out(
    architecture: str, names: list[str], tmp_path: Path
) -> None:
    model = backbone_from_config(tiny_config(architecture, eos_token_id=2))
    save_with(model, tmp_path, {name: torch.zeros(2) for name in names})
    loaded, _ = load_backbone(str(tmp_path))
    assert _equal(loaded.base_model, model.base_model)


@pytest.mark.parametrize("base", [True, False])
def test_tensors_without_a_place_in_the_architecture_are_refused(base: bool, tmp_path: Path) -> None:
    model = backbone_from_config(tiny_config("bert"))
    prefix = "" if base else "bert."
    lost = f"{prefix}encoder.layer.3.output.dense.weight"  # the config says three layers
    save_with(model.base_model if base else model, tmp_path, {lost: torch.zeros(16, 32)})
    message = rf"holds 1 tensors that BertForSequenceClassification does not use, the first '{lost}'.*too few layers"
    with pytest.raises(DataError, match=message):
        load_backbone(str(tmp_path))
    save_with(
        model.base_model if base else model,
        tmp_path,
        {name: torch.zeros(16) for name in (lost, lost.replace("weight", "bias"))},
    )
    with pytest.raises(DataError, match=r"holds 2 tensors.*too few layers"):
        load_backbone(str(tmp_path))
    with pytest.raises(DataError, match=r"BertForMaskedLM does not use"):
        load_backbone(str(tmp_path), head="masked-lm")


@pytest.mark.parametrize("adapter", [ht.Hadamard(), ht.LoRA(rank=2), ht.PromptTuning(length=2)])
def test_a_model_saved_with_its_adapter_on_is_refused(adapter: Any, tmp_path: Path) -> None:
    model = backbone_from_config(tiny_config("bert"))
    attachment = ht.attach(model, adapter)
    save_with(model, tmp_path, {})
    with pytest.raises(
        DataError, match=r"does not use, the first 'hadamard_attachment\..*saved with its adapter"
    ):
        load_backbone(str(tmp_path))
    attachment.detach()
    save_with(model, tmp_path, {})
    load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "bias"),
    [
        ("llama", "model.layers.0.self_attn.o_proj.bias"),
        ("t5", "transformer.encoder.block.0.layer.0.SelfAttention.o.bias"),
        ("modernbert", "model.layers.0.attn.Wo.bias"),
    ],
)
def test_biases_that_the_architecture_has_not_are_refused(
    architecture: str, bias: str, tmp_path: Path
) -> None:
    save_with(backbone_from_config(tiny_config(architecture)), tmp_path, {bias: torch.ones(16)})
    with pytest.raises(DataError, match=f"the first '{bias}': such biases are what merging an adapter adds"):
        load_backbone(str(tmp_path))


# --- configs ---


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_from_its_config(architecture: str, head: str) -> None:
    config = tiny_config(architecture)
    before = config.to_dict()
    if head == "masked-lm" and architecture in NO_MASKED_LM:
        with pytest.raises(UnsupportedError, match=f"'{architecture}' has no head 'masked-lm'"):
            backbone_from_config(config, head=head)
        return
    model = backbone_from_config(config, labels=3, head=head, seed=5)
    assert config.to_dict() == before
    assert not model.training
    assert _equal(model, backbone_from_config(config, labels=3, head=head, seed=5))
    with torch.device("meta"):
        ghost = backbone_from_config(config, labels=3, head=head)
    assert {p.device.type for p in ghost.parameters()} == {"meta"}
    assert {n: p.shape for n, p in ghost.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with torch.no_grad():
        outputs = model(**tiny_batch())
    if head == "span":
        assert outputs.start_logits.shape == (3, 9)
    else:
        assert (
            outputs.logits.shape
            == {"classification": (3, 3), "regression": (3, 1), "masked-lm": (3, 9, 60)}[head]
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_decoders_get_a_padding_id_and_keep_that_embedding(architecture: str) -> None:
    config = tiny_config(architecture, pad_token_id=None, eos_token_id=2)
    model = backbone_from_config(config)
    assert model.config.pad_token_id == 2
    assert model.get_input_embeddings().weight[2].abs().sum() > 0


def test_the_seed_decides_a_random_model() -> None:
    config = tiny_config("bert")
    assert not _equal(backbone_from_config(config, seed=0), backbone_from_config(config, seed=1))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"labels": 0}, "labels=0 is not allowed; it must be >= 2"),
        ({"labels": 1}, "labels=1 is not allowed; it must be >= 2"),
        ({"labels": 2.0}, "labels=2.0 is not allowed; it must be a whole number"),
        ({"labels": 0, "head": "regression"}, "labels=0 is not allowed; it must be >= 1"),
        (
            {"head": "tail"},
            "head='tail' is not allowed; choose one of 'classification', 'regression', 'span', 'masked-lm'",
        ),
    ],
)
def test_bad_arguments(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        backbone_from_config(tiny_config("bert"), **choices)
    with pytest.raises(ArgumentError, match=message):
        load_backbone("minilm-l6", **choices)


@pytest.mark.parametrize("bars", [True, False])
def test_loading_leaves_the_messages_of_transformers_as_they_were(bars: bool) -> None:
    level, before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    switch = {
        True: transformers_logging.enable_progress_bar,
        False: transformers_logging.disable_progress_bar,
    }
    try:
        switch[bars]()
        transformers_logging.set_verbosity_info()
        with _quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert transformers_logging.is_progress_bar_enabled() is bars
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        switch[before]()
        transformers_logging.set_verbosity(level)


def test_seeded_restores_the_state_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(IndexError), seeded(1):
        torch.rand(3)[3]
    assert torch.equal(before, torch.get_rng_state())
