"""Methods that choose among the backbone's own parameters: exactly which they choose, by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.adapters.life import LABELS, logits, shake
from tests.architectures import tiny_batch, tiny_model

HEAD = {"classifier.weight", "classifier.bias"}
MODULES_WITH_BIAS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
BIASES = {f"bert.encoder.layer.{i}.{module}.bias" for i in range(3) for module in MODULES_WITH_BIAS}
BIASES |= {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias"}


def norms(module: str, layers: tuple[int, ...] = (0, 1, 2)) -> set[str]:
    return {f"bert.encoder.layer.{i}.{module}.LayerNorm.{n}" for i in layers for n in ("weight", "bias")}


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (ht.HeadOnly(), set()),
        (ht.BitFit(), BIASES),
        (ht.LayerNormTuning(), norms("attention.output")),
        (ht.LayerNormTuning(norm="output", layers=(2, 0)), norms("output", (0, 2))),
        (ht.LayerNormTuning(norm="both"), norms("attention.output") | norms("output")),
    ],
    ids=["head", "bitfit", "attention-norm", "output-norm", "both-norms"],
)
def test_training_moves_these_and_no_others(adapter: Adapter, expected: set[str]) -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    ht.attach(model, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**tiny_batch(), labels=LABELS).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == expected | HEAD


def test_full_fine_tuning_is_everything_but_nothing_twice() -> None:
    model = tiny_model("bert")
    names = {name for name, _ in model.named_parameters()}
    attachment = ht.attach(model, ht.FullFineTuning())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert len(attachment.parameters()) == len(names)


def test_one_file_holds_what_was_moved(tmp_path: Path) -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.BitFit())
    shake(attachment)
    expected = logits(model)
    attachment.save(tmp_path)
    attachment.detach()
    ht.load_attachment(model, tmp_path)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("architecture", ["modernbert", "t5", "llama"])
def test_where_there_are_no_biases_bitfit_is_refused(architecture: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"BitFit trains biases, and this {architecture} backbone has none"
    ):
        ht.attach(tiny_model(architecture), ht.BitFit())


def test_bad_fields() -> None:
    with pytest.raises(ArgumentError, match="norm='first' is not allowed; choose one of"):
        ht.LayerNormTuning(norm="first")
    with pytest.raises(
        ArgumentError, match=r"norm=None is not allowed; choose one of 'attention', 'output', 'both'$"
    ):
        ht.LayerNormTuning(norm=None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layers='first' is not allowed"):
        ht.LayerNormTuning(layers="first")
