from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.training.routing import _stack
from tests.architectures import tiny_batch, tiny_config
from tests.training.test_bank import METHODS

BANKING = (
    "bert", "roberta", "electra", "mpnet", "distilbert", "albert", "modernbert", "deberta", "deberta-v2",
    "gpt2", "llama",
)  # fmt: skip
LABELS = {"a": 2, "b": 3, "c": 2}
NAMES = ["b", "a", "c", "c", "a"]
HADAMARD = ht.Hadamard()


def backbone(architecture: str = "bert", labels: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)  # the base is the same whatever the head
    model = ht.backbone_from_config(tiny_config(architecture), labels=labels)
    return model.eval()


BATCH = tiny_batch(rows=5)


class Saved:
    """Adapters with random values, saved, and the logits that each of them gives alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self, adapter: Adapter, architecture: str = "bert", labels: dict[str, int] = LABELS
    ) -> tuple[dict[str, Path], dict[str, Tensor]]:
        folders, alone = {}, {}
        for seed, (name, count) in enumerate(labels.items()):
            model = backbone(architecture, count)
            attachment = ht.attach(model, adapter, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in attachment.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
                alone[name] = model(**BATCH).logits
            folders[name] = self.root / name
            attachment.save(folders[name])
        return folders, alone


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def check_rows(folders: dict[str, Path], alone: dict[str, Tensor], architecture: str) -> None:
    model = backbone(architecture)
    with torch.no_grad():
        before = model(**BATCH).logits
    router = ht.route(model, folders)
    logits = router(NAMES, **BATCH)
    assert logits.shape == (len(NAMES), max(LABELS.values()))
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(logits[row, : LABELS[name]], alone[name][row], rtol=1e-4, atol=1e-5)
        assert torch.isinf(logits[row, LABELS[name] :]).all()
    assert not torch.allclose(alone["a"], alone["c"], atol=1e-2), "the adapters do not differ"
    router.detach()
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, before)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"FullFineTuning"}))
def test_every_row_goes_through_its_own_adapter_and_head(saved: Saved, method: str) -> None:
    check_rows(*saved(METHODS[method]), "bert")


@pytest.mark.parametrize("architecture", BANKING)
def test_every_architecture_that_banks_routes(saved: Saved, architecture: str) -> None:
    check_rows(*saved(HADAMARD, architecture), architecture)


def test_a_row_s_logits_depend_on_no_other_row(saved: Saved) -> None:
    folders, _ = saved(HADAMARD)
    router, inputs = ht.route(backbone(), folders), BATCH
    together = router(NAMES, **inputs)
    single = router(["c"], **{name: value[2:3] for name, value in inputs.items()})
    torch.testing.assert_close(together[2:3, :2], single[:, :2], rtol=1e-5, atol=1e-6)
    assert router.outputs == LABELS


def test_what_does_not_fit_together_is_refused_and_the_model_stays_as_it_was(
    saved: Saved, tmp_path: Path
) -> None:
    folders, _ = saved(HADAMARD)
    other, _ = Saved(tmp_path / "other")(ht.IA3())
    model = backbone()
    names = list(model.state_dict())
    for adapters, message in (
        ({}, "at least one name"),
        ({"a": folders["a"], "b": other["b"]}, r"adapters\['b'\] is IA3"),
        ({"a": folders["a"], "b": tmp_path / "nothing"}, "nothing"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ht.route(model, adapters)
        assert list(model.state_dict()) == names
    router = ht.route(model, folders)
    with pytest.raises(ArgumentError, match="names='d' is not allowed"):
        router(["a", "d", "a", "a", "a"], **BATCH)
    with pytest.raises(ArgumentError, match=r"names has 2 entries and the inputs have \[5\] rows"):
        router(["a", "b"], **BATCH)


def test_adapters_of_other_shapes_are_refused_with_both() -> None:
    states = {name: {"A": torch.zeros(2, width)} for name, width in (("a", 3), ("b", 4))}
    with pytest.raises(
        ArgumentError, match=r"do not fit together: A has shapes {'a': \(2, 3\), 'b': \(2, 4\)}"
    ):
        _stack(states)
    heads = {name: {"head": torch.ones(count, 3)} for name, count in (("a", 2), ("b", 3))}
    assert _stack(heads)["head"].sum(2).tolist() == [[3, 3, 0], [3, 3, 3]], "filled up with zeros"


def test_gates_over_padding_and_encoder_decoders_are_refused(saved: Saved) -> None:
    folders, _ = saved(ht.LoRA(rank=2, gated="original"))
    with pytest.raises(UnsupportedError, match="averages over padding"):
        ht.route(backbone(), folders)
    with pytest.raises(UnsupportedError, match="end tokens"):
        ht.route(backbone("t5"), folders)
