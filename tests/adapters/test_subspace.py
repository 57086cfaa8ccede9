"""Few coefficients of fixed directions: exact counts, the formula, files of bases, saved adapters without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.bases import bases_folder
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.runs.plan import parse_adapter
from tests.adapters.life import LABELS, counts_on_bert_base, logits
from tests.architectures import tiny_basis, tiny_batch, tiny_model

VECTORS = ht.Hadamard(norm=None)
WRAPPED: dict[str, tuple[Adapter, tuple[str, ...]]] = {
    "vectors": (VECTORS, ("attention_output",)),
    "before W_O": (ht.Hadamard(norm=None, placement="attention_heads"), ("attention_heads",)),
    "norms": (ht.LayerNormTuning(norm="both"), ("attention_norm", "ffn_norm")),
    "vectors and norms": (ht.Hadamard(), ("attention_output", "attention_norm")),
}
COEFFICIENTS = torch.tensor([0.7, -0.4, 0.2])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))


def moved(attachment: ht.Attachment) -> None:
    with torch.no_grad():
        for parameter in attachment.parameters("adapter"):
            if parameter.requires_grad:
                parameter.copy_(COEFFICIENTS)


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2"])
def test_it_is_the_wrapped_adapter_at_the_computed_parameters(
    wrapped: str, architecture: str, tmp_path: Path
) -> None:
    adapter, sites = WRAPPED[wrapped]
    model, name = tiny_model(architecture), tiny_basis(sites=sites)
    before, weights = logits(model), copy.deepcopy(model.state_dict())

    plain = ht.attach(model, adapter)
    directions = ht.load_basis(name).directions
    for label, parameter in plain.named_parameters().items():
        if not label.startswith("head."):
            change = COEFFICIENTS @ directions[label.partition(".")[2]][:3]
            parameter.data.add_(change)
    expected = logits(model)
    assert not torch.equal(expected, before)
    plain.detach()

    attachment = ht.attach(model, ht.Subspace(adapter, name, k=3))
    assert torch.equal(logits(model), before)
    assert attachment.count()["trained"].drop(index="head").sum() == 3
    moved(attachment)
    trained = logits(model)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), trained)
    with attachment.enabled(False):
        assert torch.equal(logits(model), before)
    attachment.save(tmp_path / "saved")
    attachment.merge()
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-6)
    attachment.detach()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())

    for path in bases_folder().iterdir():
        path.unlink()
    again = ht.load_attachment(model, tmp_path / "saved")
    assert torch.equal(logits(model), trained), "the directions came with the adapter"
    assert again.adapter == attachment.adapter


def test_only_the_coefficients_get_gradients_and_those_of_every_layer() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Subspace(VECTORS, tiny_basis(), k=3))
    model(**tiny_batch(), labels=LABELS).loss.backward()
    [coefficients] = [p for p in attachment.parameters("adapter") if p.grad is not None]
    assert coefficients.shape == (3,)
    whole = coefficients.grad.clone()  # type: ignore[union-attr]
    parts = []
    for layer in range(3):
        coefficients.grad = None
        with attachment.enabled(False, layers=tuple(other for other in range(3) if other != layer)):
            model(**tiny_batch(), labels=LABELS).loss.backward()
        parts.append(coefficients.grad)
    # At c = 0 every layer is the identity, so that the gradient is the sum over layers.
    torch.testing.assert_close(sum(parts), whole)


def test_a_layer_that_is_removed_is_as_it_was_before_training() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.Subspace(VECTORS, tiny_basis(), k=3))
    moved(attachment)
    with attachment.enabled(False, layers=(1,)):
        without = logits(model)
    with torch.no_grad():
        for name, parameter in attachment.named_parameters().items():
            if "layers.1." in name and "directions" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model), without)


def test_the_computed_vectors_stay_float32_under_autocast() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Subspace(VECTORS, tiny_basis(), k=3))
    moved(attachment)
    for insertion in attachment.insertions.values():
        exact = insertion.module.weight.clone()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(insertion.module.weight, exact)


def test_counts_do_not_need_the_basis_and_do_not_grow_with_the_backbone() -> None:
    counts = counts_on_bert_base(ht.Subspace(VECTORS, "0" * 16, k=5))
    assert counts["adapter"] == (5, 5 + 5 * 2 * 12 * 768, 5 + 5 * 2 * 12 * 768)
    assert counts["norm"] == (0, 0, 0)


def test_coefficients_can_be_masked() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.Subspace(VECTORS, tiny_basis(), k=3))
    with pytest.raises(ArgumentError, match="has no projections"):
        ht.sparsify(attachment, scorer="magnitude", sparsity=0.5)
    [name] = {
        n for n, p in attachment.named_parameters("adapter").items() if p.requires_grad and "layers.0" in n
    }
    attachment.mask({name: torch.tensor([True, False, True])}, {})
    moved(attachment)
    attachment.masking.enforce()  # type: ignore[union-attr]
    assert attachment.state_dict()[name].tolist() == pytest.approx([0.7, 0.0, 0.2])


def test_a_basis_is_named_by_its_content() -> None:
    rows = {"layers.0.attention_output.bias": np.eye(2, 4)}
    name = ht.save_basis(rows, kind="mine")
    assert ht.save_basis(rows, kind="yours") == name
    assert ht.save_basis({"layers.0.attention_output.bias": 2 * np.eye(2, 4)}) != name
    assert ht.save_basis({"layers.1.attention_output.bias": np.eye(2, 4)}) != name
    basis = ht.load_basis(name)
    assert basis.made == {"kind": "yours"}
    assert torch.equal(basis.directions["layers.0.attention_output.bias"], torch.eye(4)[:2])


@pytest.mark.parametrize(
    "rows", [{}, {"a": np.zeros(3)}, {"a": np.zeros((2, 3)), "b": np.zeros((1, 3))}, {"a": np.zeros((0, 3))}]
)
def test_what_is_no_basis_is_refused(rows: Any) -> None:
    with pytest.raises(ArgumentError, match="same number of directions"):
        ht.save_basis(rows)
    with pytest.raises(ArgumentError, match="finite"):
        ht.save_basis({"a": np.full((2, 3), np.nan)})


def test_a_missing_damaged_or_foreign_basis_is_one_error_before_anything_is_changed() -> None:
    model, name = tiny_model("bert"), tiny_basis()
    weights = copy.deepcopy(model.state_dict())
    for adapter, message in (
        (ht.Subspace(VECTORS, "0" * 16), r"basis='0{16}' is not in .*bases; copy its file there"),
        (ht.Subspace(VECTORS, name, k=9), f"k=9 is not allowed: basis='{name}' has 8 directions"),
        (
            ht.Subspace(ht.Hadamard(norm=None, layers=(0, 1)), name),
            r"layers\.2.* has 16 .* in the basis and 0 here",
        ),
        (
            ht.Subspace(ht.Hadamard(), name),
            r"layers\.0\.attention_norm\.weight has 0 .* in the basis and 16 here",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            ht.attach(model, adapter)
    with pytest.raises(ArgumentError, match="has 16 coordinates in the basis and 32 here"):
        ht.attach(tiny_model("bert", hidden_size=32), ht.Subspace(VECTORS, name))
    path = bases_folder() / f"{name}.safetensors"
    tensors = load_file(path)
    for damage in (
        lambda: save_file({key: rows + 1 for key, rows in tensors.items()}, path, {"made": "{}"}),
        lambda: save_file(tensors, path),
        lambda: path.write_bytes(path.read_bytes()[:100]),
    ):
        damage()
        with pytest.raises(DataError, match="is damaged"):
            ht.attach(model, ht.Subspace(VECTORS, name))
    assert list(model.state_dict()) == list(weights)


def test_norms_that_are_not_those_of_one_layer_are_refused() -> None:
    for architecture in ("albert", "llama"):
        with pytest.raises(UnsupportedError, match=r"needs a LayerNorm of its own .*Hadamard\(norm=None\)"):
            ht.attach(tiny_model(architecture), ht.Subspace(ht.Hadamard(), "0" * 16))


def test_other_adapters_cannot_be_wrapped() -> None:
    for wrapped in (ht.LoRA(), ht.HeadOnly(), ht.Stack(VECTORS), "Hadamard"):
        with pytest.raises(ArgumentError, match=r"wrapped=.* is not allowed; give Hadamard"):
            ht.Subspace(wrapped, "0" * 16)  # type: ignore[arg-type]


def test_it_is_written_in_plans_as_in_code() -> None:
    adapter = ht.Subspace(VECTORS, "0" * 16, k=4)
    assert parse_adapter(f'Subspace(Hadamard(norm=None), basis="{"0" * 16}", k=4)') == adapter
    assert parse_adapter(label_of(adapter)) == adapter
    assert label_of(adapter) == f'Subspace(wrapped=Hadamard(norm=None), basis="{"0" * 16}", k=4)'
