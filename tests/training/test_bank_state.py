from __future__ import annotations

import pytest
import torch
from torch import nn

import hadamard_toolkit as ht
from hadamard_toolkit.training.bank_state import Forward
from tests.architectures import tiny_batch, tiny_config


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_dropout_of_a_bank_has_the_distribution_of_passes_alone(architecture: str) -> None:
    model = ht.backbone_from_config(tiny_config(architecture, initializer_range=0.2)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    runs, batch = 400, tiny_batch()
    forward, weight = Forward(model, dict(model.named_parameters())), "classifier.out_proj.weight"
    values = {weight: model.get_parameter(weight)} if architecture == "mpnet" else {}
    values = values or {"classifier.weight": model.get_parameter("classifier.weight")}
    torch.manual_seed(0)
    with torch.no_grad():
        together = forward(
            {name: value.expand(runs, *value.shape) for name, value in values.items()},
            {name: value.expand(runs, *value.shape) for name, value in batch.items()},
        )
        alone_ = torch.stack([forward.alone(values, batch) for _ in range(runs)])
    error = torch.sqrt((together.var(0) + alone_.var(0)) / runs)
    assert ((together.mean(0) - alone_.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(together.std(0), alone_.std(0), rtol=0.2)
    assert len(torch.unique(together[:, 0, 0])) > 0.9 * runs


def test_under_autocast_frozen_linear_layers_are_cast_once_and_trained_ones_are_not() -> None:
    model = ht.backbone_from_config(tiny_config("bert")).eval()
    query, trained = model.bert.encoder.layer[0].attention.self.query, "classifier.weight"
    forward = Forward(model, {trained: model.get_parameter(trained)})
    before = query.weight
    types: list[torch.dtype] = []
    query.register_forward_pre_hook(
        lambda module, _: types.extend((module.weight.dtype, model.classifier.weight.dtype))
    )
    values, batch = {trained: model.get_parameter(trained).detach()}, tiny_batch()
    with torch.no_grad():
        forward.alone(values, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = forward.alone(values, batch)
            expected = model(**batch).logits
    half = torch.bfloat16
    assert types == [torch.float32, torch.float32, half, torch.float32, torch.float32, torch.float32]
    assert query.weight is before
    assert torch.equal(cast, expected)
