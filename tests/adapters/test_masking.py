"""Masks at work on an attachment, whatever becomes of it: narrowed, lifted, copied, pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from tests.adapters.life import LABELS, shake
from tests.architectures import tiny_batch, tiny_model

NAME = "adapter.layers.1.query.A"


def masked(kept_columns: int) -> tuple[ht.Attachment, torch.Tensor]:
    """A LoRA whose A in layer 1 keeps its first columns, and that A as it was before."""
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(rank=2))
    shake(attachment)
    before = attachment.state_dict()[NAME]
    attachment.mask({NAME: first(kept_columns)}, {"by": "hand"})
    return attachment, before


def first(columns: int) -> torch.Tensor:
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[:, :columns] = True
    return kept


def test_narrowed_masks_remember_what_was_removed_before() -> None:
    attachment, before = masked(kept_columns=8)
    assert attachment.masking is not None
    parameter = attachment.named_parameters()[NAME]
    with torch.no_grad():
        parameter[:, :8] += 1.0  # training goes on between the two steps
    attachment.masking.narrow({NAME: first(4)})
    assert not parameter[:, 4:].any()
    attachment.unmask()
    assert torch.equal(parameter[:, :8], before[:, :8] + 1.0), "as it was when the second mask removed it"
    assert torch.equal(parameter[:, 8:], before[:, 8:]), "as it was when the first mask removed it"


def test_a_narrower_mask_keeps_nothing_that_was_removed() -> None:
    attachment, _ = masked(kept_columns=8)
    assert attachment.masking is not None
    with pytest.raises(ArgumentError, match="keeps entries that were removed before"):
        attachment.masking.narrow({NAME: first(9)})


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_is_masked_in_values_and_gradients(
    again: Callable[[ht.Attachment], ht.Attachment],
) -> None:
    attachment, before = masked(kept_columns=8)
    twin = again(attachment)
    parameter = twin.named_parameters()[NAME]
    twin.model(**tiny_batch(), labels=LABELS).loss.backward()
    assert parameter.grad is not None
    assert parameter.grad[:, :8].any()
    assert not parameter.grad[:, 8:].any()
    twin.unmask()
    assert torch.equal(parameter, before)
    assert not attachment.named_parameters()[NAME][:, 8:].any(), "the original is masked as before"
    attachment.model(**tiny_batch(), labels=LABELS).loss.backward()
    assert not attachment.named_parameters()[NAME].grad[:, 8:].any()  # type: ignore[index]
