"""An attachment and its model, copied, pickled, saved as a whole: each lives on its own, on every architecture."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from tests.adapters.life import logits, shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model

Again = Callable[[ht.Attachment], ht.Attachment]
METHODS: dict[str, Adapter] = {
    "hadamard": ht.Hadamard(),
    "gated": ht.UniPELT(),
    "prompt": ht.Stack(ht.PromptTuning(length=2), ht.Pfeiffer(bottleneck=2)),
}


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_is_detached_alone(architecture: str, method: str, again: Again) -> None:
    model = tiny_model(architecture)
    before, names = logits(model), list(model.state_dict())
    attachment = ht.attach(model, METHODS[method])
    shake(attachment)
    trained = logits(model)
    twin = again(attachment)
    assert twin.model is not model
    assert torch.equal(logits(twin.model), trained)
    twin.detach()
    assert list(twin.model.state_dict()) == names
    assert torch.equal(logits(twin.model), before)
    assert torch.equal(logits(model), trained), "the original is as it was"
    attachment.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", ["albert", "llama", "bert"])
def test_a_copy_of_a_merged_one_finds_its_way_back(architecture: str) -> None:
    model = tiny_model(architecture)
    before = logits(model)
    attachment = ht.attach(model, ht.Hadamard())
    shake(attachment)
    attachment.merge()
    merged = logits(model)
    twin = copy.deepcopy(attachment)
    twin.detach()
    assert torch.equal(logits(twin.model), before)
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_saved_with_its_adapter_on(architecture: str, method: str, tmp_path: Path) -> None:
    """The backbone in the files is the plain one, and what belongs to the adapter is named for what it is."""
    model = tiny_model(architecture)
    model.config.id2label = {0: "no", 1: "yes"}  # of unnamed labels, bart's config forgets how many they are
    model.config.label2id = {"no": 0, "yes": 1}
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    attachment = ht.attach(model, METHODS[method])
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("hadamard_attachment.") for name in report["unexpected_keys"])
    assert list(again.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in again.state_dict().items())
    attachment.detach()


@pytest.mark.parametrize("first", ["before", "while attached", "after"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_seen_whenever_they_are_asked_for_first(architecture: str, first: str) -> None:
    model = tiny_model(architecture)
    expected = tiny_model(architecture)(**tiny_batch(), output_hidden_states=True)

    def seen() -> list[torch.Tensor]:
        output = model(**tiny_batch(), output_hidden_states=True)
        return list(output.get("hidden_states") or ()) + list(output.get("encoder_hidden_states") or ())

    if first == "before":
        seen()
    attachment = ht.attach(model, ht.Hadamard())
    if first == "while attached":
        assert len(seen()) > 1
    attachment.detach()
    states = list(expected.get("hidden_states") or ()) + list(expected.get("encoder_hidden_states") or ())
    found = seen()
    assert len(found) == len(states) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, states, strict=True))
