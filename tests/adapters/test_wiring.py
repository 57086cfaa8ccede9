"""The modules of an adapter are one submodule of the model; its hooks can be switched off, on and taken out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.declaring import declare
from hadamard_toolkit.adapters.wiring import HOME, Wiring
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites
from tests.adapters.life import logits
from tests.architectures import tiny_batch, tiny_model

ADAPTER = ht.Stack(ht.IA3(targets=("key",), layers=(0, 2)), ht.LoRA(rank=2, init="normal", gated="masked"))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def wired(training: bool = False) -> tuple[nn.Module, Wiring, list[str]]:
    model = tiny_model("bert").train(training)
    sites = Sites(model)
    insertions = declare(ADAPTER, sites, seed=0).insertions
    return model, Wiring(sites, insertions), list(insertions)


def test_modules_are_found_by_their_labels() -> None:
    model, _, labels = wired()
    assert labels[:3] == ["layers.0.key", "layers.2.key", "layers.0.query"]
    names = {name for name, _ in model.named_parameters()}
    assert f"{HOME}.layers.0.key.weight" in names
    assert f"{HOME}.layers.2.value.gate.bias" in names
    assert all(isinstance(model.get_submodule(f"{HOME}.{label}"), ht.SiteModule) for label in labels)


@pytest.mark.parametrize("training", [False, True])
def test_they_are_in_the_mode_of_the_model(training: bool) -> None:
    model, _, _ = wired(training)
    assert {module.training for module in model.get_submodule(HOME).modules()} == {training}


def test_some_are_off_and_on_again() -> None:
    model, wiring, labels = wired()
    base, everything, count = logits(tiny_model("bert")), logits(model), hooks(model)
    assert not torch.equal(everything, base)
    wiring.connect(off=labels)
    assert torch.equal(logits(model), base)
    assert hooks(model) == 0
    wiring.connect(off=[label for label in labels if not label.endswith("key")])
    assert torch.equal(logits(model), base), "(IA)³ starts as the identity"
    assert hooks(model) == 3, "two modules, and the guard of the base model"
    wiring.connect()
    wiring.connect()
    assert (torch.equal(logits(model), everything), hooks(model)) == (True, count)


def test_the_guard_comes_first() -> None:
    model, _, _ = wired()
    replica = model.base_model._replicate_for_data_parallel()
    with pytest.raises(UnsupportedError, match="DataParallel"):
        replica(**tiny_batch())


def test_nothing_is_left_when_it_is_removed() -> None:
    model, wiring, _ = wired()
    wiring.remove()
    assert not hasattr(model, HOME)
    assert hooks(model) == 0
    assert torch.equal(logits(model), logits(tiny_model("bert")))
