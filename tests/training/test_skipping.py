from __future__ import annotations

import torch
from torch import nn

from hadamard_toolkit.training.skipping import Forms, evaluating, replaced_forward


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_forward_that_was_replaced_before_comes_back() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    before = layer(x)
    with replaced_forward(layer, lambda x: x + 1):
        with replaced_forward(layer, lambda x: x + 2):
            assert torch.equal(layer(x), x + 2)
        assert torch.equal(layer(x), x + 1)
    assert torch.equal(layer(x), before)


def test_states_are_returned_in_the_form_of_the_layer() -> None:
    forms, x = Forms(), torch.ones(1)
    forms.note(1)(nn.Identity(), (), (x, x, x))
    forms.note(0)(nn.Identity(), (), x)
    assert forms.output(0, x) is x
    assert forms.output(1, x) == (x, None, None)
