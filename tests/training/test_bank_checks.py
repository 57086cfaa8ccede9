"""What cannot be trained as a bank is refused before anything changes, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.training import bank
from hadamard_toolkit.training.bank import Member, check_bank, train_bank
from hadamard_toolkit.training.bank_state import Forward
from tests.training.test_bank import member, shortly


def test_spans_are_refused() -> None:
    task: Any = SimpleNamespace(kind="span")
    with pytest.raises(UnsupportedError, match="classification and regression, not spans"):
        check_bank([replace(member(), task=task)])


def test_a_model_without_weights_is_refused() -> None:
    one = member()
    one.attachment.model.to("meta")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="on the meta device"):
        check_bank([one])


def test_parameters_of_two_types_are_refused() -> None:
    one = member()
    parameter = one.attachment.parameters("adapter")[0]
    parameter.data = parameter.data.double()
    with pytest.raises(UnsupportedError, match="parameters of one type only"):
        check_bank([one])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "open_accelerator", lambda protocol: SimpleNamespace(num_processes=2))
    with pytest.raises(UnsupportedError, match="a bank trains in one process"):
        train_bank([member()])


def with_logits(times: float) -> Member:
    """A run whose logits are larger than 1 where `times` is."""
    one = member(protocol=shortly(epochs=1, head_epochs=1))
    with torch.no_grad():
        one.attachment.model.classifier.weight.mul_(times)
    return one


@pytest.mark.parametrize(
    ("times", "wrong", "off"),
    [
        (1e-3, lambda logits: logits + 5e-4, False),
        (1e-3, lambda logits: logits + 2e-3, True),  # at least as exact as numbers of size 1
        (1e3, lambda logits: logits * (1 + 5e-4), False),
        (1e3, lambda logits: logits * (1 + 2e-3), True),  # and relative to larger ones
        (1.0, lambda logits: logits * float("nan"), True),
    ],
)
def test_a_pass_that_is_off_is_refused(
    times: float, wrong: Callable[[Tensor], Tensor], off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda *arguments: wrong(original(*arguments)))
    if not off:
        assert train_bank([with_logits(times)])[0].details["bank"] == 1  # type: ignore[union-attr]
        return
    with pytest.raises(UnsupportedError, match="as a bank is off by"):
        train_bank([with_logits(times)])


def test_a_model_that_has_no_common_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no batching rule\nfor this operator")

    monkeypatch.setattr(Forward, "__call__", fail)
    with pytest.raises(UnsupportedError, match=r"cannot run as a bank: no batching rule$"):
        train_bank([member()])
