"""Masks hold: through training, precision, files, merging and detaching; and say where they fall."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim import SGD, AdamW, Optimizer

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.files import read_state
from hadamard_toolkit.errors import ArgumentError, DataError, TrainingError
from hadamard_toolkit.runs.record import stored_vectors
from hadamard_toolkit.training.protocol import Protocol
from tests.architectures import tiny_batch, tiny_model
from tests.sparsity.tiny import ADAPTERS, attached, batches, pruned
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.5),
    "fused adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "sgd": lambda p: SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def steps(attachment: ht.Attachment, optimizer: Optimizer, count: int = 4) -> None:
    for step in range(count):
        optimizer.zero_grad()
        attachment.model(**batches(4, seed=step)[0]).loss.backward()
        optimizer.step()


def states(optimizer: Optimizer, masks: ht.Masks, attachment: ht.Attachment) -> list[torch.Tensor]:
    """Every optimizer state at removed entries."""
    own = attachment.named_parameters()
    return [
        value[~mask]
        for name, mask in masks.kept.items()
        for value in optimizer.state[own[name]].values()
        if isinstance(value, torch.Tensor) and value.shape == mask.shape
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_removed_entries_stay_zero_in_value_gradient_and_optimizer(name: str, optimizer: str) -> None:
    attachment = attached(ADAPTERS[name])
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    made = OPTIMIZERS[optimizer]([p for p in attachment.parameters() if p.requires_grad])
    before = attachment.state_dict()
    steps(attachment, made)
    own = attachment.named_parameters()
    assert not pruned(attachment, masks).any()
    for key, mask in masks.kept.items():
        assert not own[key].grad[~mask].any()
        moved = (own[key].detach() != before[key])[mask]
        assert moved.float().mean() > 0.5, "what stays, trains"
    found = states(made, masks, attachment)
    assert len(found) >= len(masks.kept)
    assert not any(state.any() for state in found)


def test_the_forward_pass_is_that_of_zeroed_weights() -> None:
    attachment, twin = attached(), attached()
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.7, batches=batches())
    with torch.no_grad():
        for name, mask in masks.kept.items():
            twin.named_parameters()[name].mul_(mask)
        assert torch.equal(attachment.model(**tiny_batch()).logits, twin.model(**tiny_batch()).logits)


def test_through_bf16_autocast_and_a_change_of_dtype_or_mode() -> None:
    attachment = attached()
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    optimizer = OPTIMIZERS["adamw"](attachment.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        steps(attachment, optimizer)
    assert not pruned(attachment, masks).any()
    attachment.train_only("head")
    attachment.train_only("adapter", "head")
    attachment.model.train().bfloat16()
    optimizer = OPTIMIZERS["sgd"](attachment.parameters())
    steps(attachment, optimizer)
    assert next(iter(attachment.named_parameters().values())).dtype == torch.bfloat16
    assert not pruned(attachment, masks).any()
    assert not any(state.any() for state in states(optimizer, masks, attachment))


def test_a_gradient_that_is_not_finite_does_not_reach_removed_entries() -> None:
    attachment = attached()
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    (attachment.model(**batches()[0]).loss * torch.nan).backward()
    own = attachment.named_parameters()
    assert all((own[name].grad[~mask] == 0).all() for name, mask in masks.kept.items())


TRAINING = {
    "learning_rate": 2e-2,
    "epochs": 3,
    "head_learning_rate": 2e-2,
    "head_epochs": 2,
    "batch_size": 16,
    "weight_decay": 0.3,
    "max_length": 24,
}


@pytest.mark.parametrize("head", ["trained", "first-then-frozen", "frozen-random"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_full_training_run_with_best_epoch_and_reload(head: str, precision: str, tmp_path: Path) -> None:
    task, tokenizer = tiny_task(), tiny_tokenizer()
    attachment = ht.attach(tiny_bert(), ht.Houlsby(bottleneck=4, init="normal"))
    drawn = ht.draw_batches(task, tokenizer, examples=20, batch_size=8, seed=2, max_length=24)
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.6, batches=drawn, scope="tensor")
    start = attachment.state_dict()
    protocol = Protocol(head=head, precision=precision, validation_rows=16, **TRAINING)
    outcome = ht.train(attachment, task, tokenizer, protocol)
    assert not pruned(attachment, masks).any()
    assert not torch.equal(start[name := next(iter(masks.kept))], attachment.state_dict()[name])

    attachment.save(tmp_path / "run")
    predicted = attachment.model.eval()(**tiny_batch()).logits
    reloaded = ht.load_attachment(tiny_bert(), tmp_path / "run")
    assert torch.equal(reloaded.model.eval()(**tiny_batch()).logits, predicted)
    found = ht.Masks.of(reloaded)
    assert all(torch.equal(mask, masks.kept[key]) for key, mask in found.kept.items())
    ht.train(reloaded, task, tokenizer, protocol)
    assert not pruned(reloaded, found).any(), "masks hold on after the reload"
    assert outcome.metrics["test"]["loss"] > 0


def test_a_failed_run_keeps_the_masks() -> None:
    attachment = ht.attach(tiny_bert(), ht.Houlsby(bottleneck=4, init="normal"))
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    protocol = Protocol(**{**TRAINING, "learning_rate": 1e30, "clip": None, "warmup": 0.0})
    with pytest.raises(TrainingError):
        ht.train(attachment, tiny_task(), tiny_tokenizer(), protocol)
    assert not pruned(attachment, masks).any()


def test_loading_dense_values_keeps_removed_entries_at_zero() -> None:
    attachment = attached()
    dense = attachment.state_dict()
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    attachment.load_state_dict({name: value + 1 for name, value in dense.items()})
    assert not pruned(attachment, masks).any()
    assert torch.equal(attachment.state_dict()["head.classifier.bias"], dense["head.classifier.bias"] + 1)


# files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_save_stores_kept_entries_only_and_reloads_exactly(name: str, tmp_path: Path) -> None:
    attachment = attached(ADAPTERS[name])
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.8)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.1)
    attachment.masking.enforce()  # type: ignore[union-attr]
    state, logits = attachment.stored_state(), attachment.model(**tiny_batch()).logits
    attachment.save(tmp_path / "sparse")
    assert {path.name for path in (tmp_path / "sparse").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "masks.json", "masks.safetensors")
    }
    files = load_file(tmp_path / "sparse" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in files.values()) == attachment.count()["stored"].sum()
    assert sum(t.numel() for t in load_file(tmp_path / "sparse" / "masks.safetensors").values()) <= (
        masks.entries / 8 + len(masks.kept)
    )
    assert all(torch.equal(value, state[key]) for key, value in read_state(tmp_path / "sparse").items())

    reloaded = ht.load_attachment(attachment.detach(), tmp_path / "sparse")
    assert torch.equal(reloaded.model(**tiny_batch()).logits, logits)
    dense = attached(ADAPTERS[name]).count().loc["adapter", "stored"]
    assert (reloaded.count().loc["adapter", ["stored", "nonzero"]] == dense - masks.removed).all()
    reloaded.save(tmp_path / "again")
    for file in (tmp_path / "sparse").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_sparse_file_is_as_much_smaller_as_it_should_be(tmp_path: Path) -> None:
    def weight(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    attachment = attached(ht.Houlsby(bottleneck=64, init="normal"), hidden_size=64)
    attachment.save(tmp_path / "dense")
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.9)
    attachment.save(tmp_path / "sparse")
    saved = weight(tmp_path / "dense") - weight(tmp_path / "sparse")
    ideal = 4 * masks.removed - masks.entries / 8  # float32 values less the bits
    assert ideal - 4096 < saved <= ideal, "all but the header of the second file"
    assert weight(tmp_path / "sparse") < 0.25 * weight(tmp_path / "dense")

    masks.remove()
    attachment.save(tmp_path / "sparse")
    assert {path.name for path in (tmp_path / "sparse").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert weight(tmp_path / "sparse") == weight(tmp_path / "dense")


def test_masks_find_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    masks = ht.sparsify(attached(), scorer="random", sparsity=0.5)
    masks.save("~/masks/one")
    assert {file.name for file in (tmp_path / "masks" / "one").iterdir()} == {
        "masks.json",
        "masks.safetensors",
    }
    assert all(
        torch.equal(mask, masks.kept[name]) for name, mask in ht.Masks.load("~/masks/one").kept.items()
    )


def test_masks_have_files_of_their_own_with_provenance(tmp_path: Path) -> None:
    masks = ht.sparsify(attached(seed=3), scorer="snip", sparsity=0.5, batches=batches(), seed=7)
    masks.save(tmp_path / "masks")
    loaded = ht.Masks.load(tmp_path / "masks")
    assert loaded.provenance == json.loads(json.dumps(masks.provenance))
    assert loaded.places == masks.places
    assert list(loaded.kept) == list(masks.kept)
    assert all(torch.equal(mask, masks.kept[name]) for name, mask in loaded.kept.items())
    assert all(array.dtype == np.bool_ for array in loaded.arrays().values())
    with pytest.raises(ArgumentError, match="not applied"):
        loaded.remove()

    attachment = loaded.attach(tiny_model("bert"))
    assert attachment.seed == 3
    assert not pruned(attachment, loaded).any()
    fresh = attached(seed=3)
    ht.Masks.of(attachment).remove()
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in attachment.state_dict().items())


def test_arrays_are_copies_that_may_be_changed() -> None:
    masks = ht.sparsify(attached(), scorer="random", sparsity=0.5)
    removed = masks.removed
    for array in masks.arrays().values():
        array[...] = True
    assert masks.removed == removed == masks.entries // 2


def test_after_a_reload_remove_gives_the_initial_values_back(tmp_path: Path) -> None:
    attachment = attached(seed=3)
    dense = attachment.state_dict()
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5)
    steps(attachment, OPTIMIZERS["adamw"](attachment.parameters()))
    trained = attachment.state_dict()
    attachment.save(tmp_path / "run")
    reloaded = ht.load_attachment(tiny_model("bert"), tmp_path / "run")
    for one in (attachment, reloaded):
        ht.Masks.of(one).remove()
        for name, mask in masks.kept.items():
            assert torch.equal(one.state_dict()[name], torch.where(mask, trained[name], dense[name]))


def test_vectors_of_a_run_on_disk_are_whole(tmp_path: Path) -> None:
    attachment = attached(ht.Hadamard())
    ht.sparsify(attachment, scorer="random", sparsity=0.5, maskable="vectors")
    attachment.save(tmp_path)
    stored, here = stored_vectors(tmp_path), attachment.vectors()
    assert set(stored) == set(here)
    assert all(np.array_equal(stored[name], here[name]) for name in here)
    assert (here["attention_output.weight"] == 0).any()


def test_a_fusion_takes_sparse_adapters(tmp_path: Path) -> None:
    single = attached(ADAPTERS["pfeiffer"])
    ht.sparsify(single, scorer="random", sparsity=0.5)
    single.save(tmp_path / "one")
    fused = ht.fuse(tiny_model("bert"), {"one": tmp_path / "one"})
    value = fused.state_dict()["adapter.layers.0.ffn_residual.tasks.one.down.weight"]
    assert torch.equal(value, single.state_dict()["adapter.layers.0.ffn_residual.down.weight"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "masks.json").unlink(), "holds no masks"),
        (lambda f: (f / "masks.json").write_text("{"), "are damaged"),
        (lambda f: (f / "masks.json").write_text('{"shapes": {}, "format": 9}'), "format 9"),
        (lambda f: (f / "masks.safetensors").write_bytes(b"12345678"), "are damaged"),
    ],
)
def test_damaged_masks_are_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    attachment = attached()
    ht.sparsify(attachment, scorer="random", sparsity=0.5)
    attachment.save(tmp_path / "run")
    damage(tmp_path / "run")
    model = tiny_model("bert")
    with pytest.raises((DataError, ArgumentError), match=message):
        ht.load_attachment(model, tmp_path / "run")
    assert not hasattr(model, "hadamard_attachment")


def test_masks_that_do_not_fit_are_refused() -> None:
    masks = ht.sparsify(attached(), scorer="random", sparsity=0.5)
    with pytest.raises(DataError, match=r"mask of 'adapter.*down.weight' has shape \(3, 16\).*has \(5, 16\)"):
        masks.apply(attached(ht.Houlsby(bottleneck=5)))
    with pytest.raises(DataError, match="not a parameter of this attachment"):
        masks.apply(attached(ht.LoRA()))
    with pytest.raises(ArgumentError, match="has no masks"):
        ht.Masks.of(attached())


# merging and leaving -----------------------------------------------------------------------------------------


def test_a_masked_lora_merges_and_detaches() -> None:
    model = tiny_model("bert")
    weights, plain = copy.deepcopy(model.state_dict()), model(**tiny_batch()).logits
    attachment = ht.attach(model, ht.LoRA(rank=4, init="normal"))
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=batches())
    masked = model(**tiny_batch()).logits
    assert not torch.equal(masked, plain)
    attachment.merge()
    assert torch.allclose(model(**tiny_batch()).logits, masked, atol=1e-6)
    with pytest.raises(ArgumentError, match="merged"):
        masks.remove()
    attachment.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**tiny_batch()).logits, plain)
    with pytest.raises(ArgumentError, match="not applied"):
        masks.remove()


def test_detach_restores_masked_norms_and_lets_their_gradients_go() -> None:
    model = tiny_model("albert")  # whose norm is one tensor under several names
    weights = copy.deepcopy(model.state_dict())
    attachment = ht.attach(model, ht.LayerNormTuning())
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5, maskable="norms")
    assert masks.entries == 32
    with attachment.enabled(False):
        assert torch.equal(model(**tiny_batch()).logits, _plain().model(**tiny_batch()).logits)
    assert not pruned(attachment, masks).any()
    attachment.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    norm = model.base_model.encoder.albert_layer_groups[0].albert_layers[0].attention.LayerNorm
    norm.requires_grad_(True)
    model(**batches()[0]).loss.backward()
    assert (norm.weight.grad != 0).all()


def _plain() -> ht.Attachment:
    return ht.attach(tiny_model("albert"), ht.HeadOnly())


# looking -----------------------------------------------------------------------------------------------------


def test_the_table_by_tensor_layer_and_site() -> None:
    masks = ht.sparsify(attached(), scorer="snip", sparsity=0.5, batches=batches())
    tensors = masks.table()
    assert list(tensors.columns) == ["layer", "site", "kind", "shape", "entries", "kept", "density"]
    row = tensors.loc["adapter.layers.1.ffn_output.up.weight"]
    assert (row["layer"], row["site"], row["kind"], row["shape"]) == (1, "ffn_output", "projections", (16, 3))
    for name, mask in masks.kept.items():
        assert tensors.loc[name, "density"] == mask.double().mean().item()
    for by, index in (("layer", [0, 1, 2]), ("site", ["attention_output", "ffn_output"])):
        table = masks.table(by)
        assert list(table.index) == index
        assert table["kept"].sum() == masks.entries - masks.removed
        assert (table["density"] == table["kept"] / table["entries"]).all()
    assert masks.density == pytest.approx(0.5)
    report = masks.report()
    assert report["requested"] == 0.5
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(ArgumentError, match="by='row'"):
        masks.table("row")
