"""Masks at work on an attachment, whatever becomes of it: narrowed, lifted, copied, pickled."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.masking import RECORD, compact, expand
from hadamard_toolkit.errors import ArgumentError, DataError
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


def test_a_mask_holds_for_a_parameter_that_trains_only_later() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(rank=2))
    shake(attachment)
    attachment.train_only("head")
    attachment.mask({NAME: first(8)}, {"by": "hand"})
    parameter = attachment.named_parameters()[NAME]
    assert not parameter.requires_grad, "masking does not make it train"
    attachment.train_only("adapter")
    attachment.model(**tiny_batch(), labels=LABELS).loss.backward()
    assert parameter.grad is not None
    assert parameter.grad[:, :8].any()
    assert not parameter.grad[:, 8:].any()


def test_gradients_that_are_not_finite_do_not_reach_removed_entries() -> None:
    attachment, _ = masked(kept_columns=8)
    parameter = attachment.named_parameters()[NAME]
    (parameter * torch.inf).sum().backward()
    assert parameter.grad is not None
    assert torch.isinf(parameter.grad[:, :8]).all()
    assert torch.equal(parameter.grad[:, 8:], torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("adapter.layers.9.query.A", (2, 16), "'adapter.layers.9.query.A', which is not a parameter"),
        (NAME, (16, 2), r"has shape \(16, 2\); this parameter has \(2, 16\)"),
    ],
)
def test_a_mask_fits_a_parameter(name: str, shape: tuple[int, ...], message: str) -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(rank=2))
    with pytest.raises(DataError, match=message):
        attachment.mask({name: torch.ones(shape, dtype=torch.bool)}, {})
    assert attachment.masking is None


def test_masks_come_once_and_before_merging() -> None:
    attachment, _ = masked(kept_columns=8)
    with pytest.raises(ArgumentError, match="has masks already"):
        attachment.mask({NAME: first(4)}, {"by": "hand"})
    merged = ht.attach(tiny_model("bert"), ht.LoRA(rank=2))
    merged.merge()
    with pytest.raises(ArgumentError, match="masks must be there before merge"):
        merged.mask({NAME: first(4)}, {"by": "hand"})
    assert not merged.masking


def test_kept_entries_come_back_where_they_were() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    kept = {"a": torch.tensor([[True, False, True], [False, False, True]])}
    small = compact(state, kept)
    assert small["a"].tolist() == [0, 2, 5]
    full = expand(small, kept)
    assert torch.equal(full["a"], state["a"] * kept["a"])
    assert torch.equal(full["b"], state["b"])
    for wrong in (small["a"][:2], state["a"]):
        with pytest.raises(DataError, match="the kept entries of 'a' do not fit its mask, which keeps 3"):
            expand({"a": wrong}, kept)
    with pytest.raises(DataError, match="the kept entries of 'a' do not fit"):
        expand({"b": state["b"]}, kept)


def test_masks_are_written_in_the_format_that_earlier_versions_read(tmp_path: Path) -> None:
    attachment, _ = masked(kept_columns=8)
    attachment.save(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["format"] == 1
    assert record["shapes"] == {NAME: [2, 16]}
