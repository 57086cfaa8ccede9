"""Depth steps of an ALBERT: places of their own over the same parameters, and nothing left when they are gone."""

from __future__ import annotations

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.unsharing import unshare
from tests.architectures import tiny_batch, tiny_model


def test_unshare_keeps_outputs_parameters_and_undoes_itself() -> None:
    model = tiny_model("albert")
    keys, count = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    before = model(**tiny_batch()).logits
    undo = unshare(model)
    assert undo is not None
    assert len(model.albert.encoder.albert_layer_groups) == 3
    assert sum(p.numel() for p in model.parameters()) == count, "the same tensors"
    assert torch.equal(model(**tiny_batch()).logits, before)
    undo.undo()
    assert list(model.state_dict()) == keys
    assert model.config.num_hidden_groups == 1
    assert torch.equal(model(**tiny_batch()).logits, before)
    assert unshare(tiny_model("bert")) is None


@pytest.mark.parametrize("groups", [1, 2])
def test_the_state_dict_is_that_of_the_shared_groups(groups: int) -> None:
    model = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(**tiny_batch()).logits
    steps = unshare(model)
    assert steps is not None
    assert model.config.num_hidden_groups == groups
    assert len(model.albert.encoder.albert_layer_groups) == 4
    assert list(model.state_dict()) == list(before)
    assert list(model.albert.encoder.albert_layer_groups.state_dict()) == [
        name.partition("albert_layer_groups.")[2] for name in before if "albert_layer_groups." in name
    ]
    other = tiny_model("albert", seed=1, num_hidden_layers=4, num_hidden_groups=groups)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(**tiny_batch()).logits, other(**tiny_batch()).logits)
    model.load_state_dict(before)
    assert torch.equal(model(**tiny_batch()).logits, logits)
    extra = {**before, "albert.encoder.albert_layer_groups.3.albert_layers.0.ffn.bias": torch.zeros(32)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*albert_layer_groups.3"):
        model.load_state_dict(extra)
    short = {name: value for name, value in before.items() if "groups.0.albert_layers.0.ffn.bias" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*albert_layer_groups.0.albert_layers.0.ffn.bias"):
        model.load_state_dict(short)
    steps.undo()
    assert torch.equal(model(**tiny_batch()).logits, logits)


def test_steps_follow_the_mode_of_the_model_and_leave_it() -> None:
    model = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=2)
    steps = unshare(model)
    assert steps is not None
    model.train()
    steps.undo()
    assert all(module.training for module in model.modules())


def test_untied_steps_are_a_model_without_sharing() -> None:
    model = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=2)
    count, logits = sum(p.numel() for p in model.parameters()), model(**tiny_batch()).logits
    steps = unshare(model)
    assert steps is not None
    steps.untie()
    assert model.config.num_hidden_groups == 4
    assert sum(p.numel() for p in model.parameters()) > 1.5 * count
    assert torch.equal(model(**tiny_batch()).logits, logits)
    steps.undo()
    assert model.config.num_hidden_groups == 2
    assert sum(p.numel() for p in model.parameters()) == count
    assert torch.equal(model(**tiny_batch()).logits, logits)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_two_blocks_in_a_group_are_refused(groups: int) -> None:
    model = tiny_model("albert", num_hidden_groups=groups, inner_group_num=2)
    before = list(model.state_dict())
    with pytest.raises(UnsupportedError, match="inner_group_num=2 is not supported"):
        ht.attach(model, ht.Hadamard())
    assert list(model.state_dict()) == before
