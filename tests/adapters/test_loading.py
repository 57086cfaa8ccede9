"""A saved adapter comes back whole, with its labels, and without its head where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import pipeline

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import DataError
from tests.adapters.life import logits, shake
from tests.architectures import tiny_config, tiny_model

Minilm = Callable[..., tuple[Any, Any]]
ADAPTERS: list[Adapter] = [
    ht.Hadamard(),
    ht.Stack(ht.LoRA(rank=2), ht.IA3(), ht.LoRA(rank=1)),
    ht.PrefixTuning(length=3, bottleneck=4, gated="masked"),
    ht.PromptTuning(length=3),
    ht.AdapterFusion(("a", "b"), bottleneck=2),
    ht.BitFit(),
]


def saved(adapter: Adapter, folder: Path) -> ht.Attachment:
    attachment = ht.attach(tiny_model("bert"), adapter)
    shake(attachment)
    attachment.save(folder)
    return attachment


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Give `folder` these tensors, as a save of them would have (in format 2 the config has their digest)."""
    data = save(tensors)
    (folder / "adapter_model.safetensors").write_bytes(data)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["files"]["adapter_model.safetensors"] = sha256(data).hexdigest()
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_every_tensor_is_there_and_no_other(adapter: Adapter, tmp_path: Path) -> None:
    attachment = saved(adapter, tmp_path)
    whole = load(tmp_path.joinpath("adapter_model.safetensors").read_bytes())
    for missing in (min(whole), max(whole), sorted(whole)[len(whole) // 2]):
        rewrite(tmp_path, {name: value for name, value in whole.items() if name != missing})
        model = tiny_model("bert")
        before = logits(model)
        with pytest.raises(DataError, match=rf"lacks 1 of the tensors of .* the first '{missing}'"):
            ht.load_attachment(model, tmp_path)
        assert not hasattr(model, "hadamard_attachment")
        assert torch.equal(logits(model), before)
    rewrite(tmp_path, {**whole, "adapter.layers.7.query.A": torch.zeros(2, 2)})
    with pytest.raises(DataError, match=r"has, and should not have, 1 .* 'adapter.layers.7.query.A'"):
        ht.load_attachment(tiny_model("bert"), tmp_path)
    rewrite(tmp_path, whole)
    again = ht.load_attachment(tiny_model("bert"), tmp_path)
    torch.testing.assert_close(logits(again.model), logits(attachment.model), rtol=0, atol=1e-6)


def test_without_its_head(tmp_path: Path) -> None:
    trained = saved(ht.Hadamard(), tmp_path)
    model = ht.backbone_from_config(tiny_config("bert"), labels=5).eval()
    model.bert.load_state_dict(tiny_model("bert").bert.state_dict())
    with pytest.raises(DataError, match="shape"):
        ht.load_attachment(model, tmp_path)
    own = model.classifier.weight.detach().clone()
    attachment = ht.load_attachment(model, tmp_path, head=False)
    assert torch.equal(model.classifier.weight, own)
    for role in ("adapter", "norm"):
        theirs = trained.named_parameters(role)
        assert theirs
        assert all(torch.equal(p, theirs[name]) for name, p in attachment.named_parameters(role).items())


def test_another_head_is_named_with_the_way_out(tmp_path: Path) -> None:
    saved(ht.Hadamard(), tmp_path)
    model = ht.backbone_from_config(tiny_config("bert"), head="span").eval()
    with pytest.raises(
        DataError, match=r"lacks 2 .*BertForQuestionAnswering.*'head.qa_outputs.bias'.*head=False"
    ):
        ht.load_attachment(model, tmp_path, strict=False)
    ht.load_attachment(model, tmp_path, strict=False, head=False)


def test_names_of_labels_task_and_backbone_are_kept(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.name_or_path = "tiny-bert"
    attachment = ht.attach(model, ht.Hadamard())
    assert attachment.labels is None, "LABEL_0 and LABEL_1 are no names"
    attachment.name_labels(("negative", "positive"), "reviews")
    attachment.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["labels"], config["task"]) == (["negative", "positive"], "reviews")
    assert config["backbone"]["name"] == "tiny-bert"

    fresh = tiny_model("bert")
    own = dict(fresh.config.id2label)
    again = ht.load_attachment(fresh, tmp_path)
    assert (again.labels, again.task) == (["negative", "positive"], "reviews")
    assert fresh.config.label2id == {"negative": 0, "positive": 1}
    again.detach()
    assert fresh.config.id2label == own
    assert set(fresh.config.label2id) == set(own.values())
    ht.load_attachment(fresh, tmp_path, head=False)
    assert fresh.config.id2label == own, "they are names of the head"


def test_names_given_to_the_model_by_hand_are_saved_and_stay(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.id2label = {0: "no", 1: "yes"}
    attachment = ht.attach(model, ht.Hadamard())
    attachment.save(tmp_path)
    attachment.detach()
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert ht.load_attachment(tiny_model("bert"), tmp_path).labels == ["no", "yes"]


def test_a_pipeline_says_what_the_label_is_called(minilm: Minilm, tmp_path: Path) -> None:
    model, _ = minilm()
    attachment = ht.attach(model, ht.Hadamard(layers=(0,)))
    attachment.name_labels(("negative", "positive"), "reviews")
    attachment.save(tmp_path / "adapter")
    fresh, tokenizer = minilm()
    merged = ht.load_attachment(fresh, tmp_path / "adapter").merge()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for source in (merged, str(tmp_path / "merged")):
        classify = pipeline(
            "text-classification", model=source, tokenizer=tokenizer, device="cpu", top_k=None
        )
        assert {row["label"] for row in classify("a warm day")[0]} == {"negative", "positive"}
