"""What every adapter owes its model, whichever it is: used by the tests of single methods."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.errors import UnsupportedError
from tests.architectures import tiny_batch, tiny_model

LABELS = torch.tensor([0, 1, 0])


def logits(model: PreTrainedModel, **changes: object) -> Tensor:
    with torch.no_grad():
        return model(**{**tiny_batch(), **changes}).logits


def shake(attachment: ht.Attachment, seed: int = 1, scale: float = 0.2) -> None:
    """Move every parameter, as training (the frozen ones: an earlier training) would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def spread(attachment: ht.Attachment) -> None:
    """Give every parameter of the adapter a plain random value, the frozen ones too, in float64."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator).double()


def configs(model: PreTrainedModel) -> list[tuple[int, str | None]]:
    found = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    return [(id(config), config._attn_implementation) for config in found]


def check_life(architecture: str, adapter: Adapter, folder: Path, *, identity: bool = False) -> None:
    """Attach, gradients, one step, save, switch off, refuse to merge, detach bit for bit, reload."""
    model = tiny_model(architecture)
    before, weights, implementations = logits(model), copy.deepcopy(model.state_dict()), configs(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    attachment = ht.attach(model, adapter)
    assert torch.equal(logits(model), before) == identity, "identity at initialisation, where there is one"
    shake(attachment)

    def loss() -> Tensor:
        result: Tensor = model(**tiny_batch(), labels=LABELS).loss
        return result

    first = loss()
    first.backward()
    ours = {id(p): p for p in attachment.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in ours), name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (
            id(parameter) in ours
        ), name
    squared = sum(float((p.grad**2).sum()) for p in ours.values() if p.grad is not None)
    with torch.no_grad():
        for parameter in ours.values():
            assert parameter.grad is not None
            parameter.sub_(
                parameter.grad, alpha=0.01 * float(first) / squared
            )  # 1 % of the loss, by first order
    assert loss() < first, "one training step lowers the loss"

    trained = logits(model)
    attachment.save(folder / "saved")
    with attachment.enabled(False):
        silent = logits(model)
    assert torch.equal(logits(model), trained)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), trained)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        attachment.merge()
    head = {name: value for name, value in attachment.state_dict().items() if name.startswith("head.")}

    attachment.detach()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert configs(model) == implementations
    assert torch.equal(logits(twin), trained), "a deep copy lives on"

    plain = ht.attach(model, ht.HeadOnly())
    plain.load_state_dict(head)
    assert torch.equal(logits(model), silent), "enabled(False) is the backbone with the head as it is"
    plain.detach()

    reloaded = ht.load_attachment(model, folder / "saved")
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-6)
    reloaded.detach()


def counts_on_bert_base(adapter: Adapter) -> dict[str, tuple[int, int, int]]:
    """Role -> (trained, stored, non-zero), from the config alone."""
    with torch.device("meta"):
        model = ht.backbone_from_config(BertConfig())
    table = ht.attach(model, adapter).count()
    return {role: tuple(int(n) for n in row) for role, row in zip(table.index, table.to_numpy(), strict=True)}  # type: ignore[misc]


def check_json(adapter: Adapter) -> None:
    assert adapter_from_dict(adapter_to_dict(adapter)) == adapter
    hash(adapter)
