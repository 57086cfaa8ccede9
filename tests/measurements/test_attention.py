"""Attention outputs before and after: nothing for an untouched backbone, what the algebra says for vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.measurements import attention as module
from hadamard_toolkit.measurements.attention import _batches, _examples, _outputs, attention
from hadamard_toolkit.sites import Sites


@pytest.fixture
def store(tmp_path: Path) -> ht.RunStore:
    return ht.RunStore(tmp_path / "store")


def test_a_head_alone_shifts_nothing(store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]) -> None:
    table = attention(ht.run(make_spec(adapter=ht.HeadOnly()), store), store, examples=12)
    assert len(table) == 3 * 12
    np.testing.assert_array_equal(table["before"], table["after"])
    held = table["example"] >= 6
    assert table.loc[~held, "linear"].isna().all()
    assert (table.loc[held, "unchanged"] == 0).all()
    assert table["cka"].to_numpy() == pytest.approx(1)
    assert table["cka_seeds"].isna().all(), "the store has no other seed"
    shares = table[held].groupby("layer")["total"].sum()
    assert shares.to_numpy() == pytest.approx(1, abs=1e-4)


def test_full_fine_tuning_is_trained_again_and_shifts(
    store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]
) -> None:
    protocol = ht.protocols.full_fine_tuning(
        epochs=1, learning_rate=1e-3, train_rows=48, validation_rows=16, max_length=24, batch_size=16
    )
    specs = [make_spec(adapter=ht.FullFineTuning(), protocol=protocol, seed=seed) for seed in (0, 1)]
    for spec in specs:
        ht.run(spec, store)
    table = attention(store.run(specs[0].key), store, examples=12)
    assert (table["before"] != table["after"]).all()
    assert table["cka"].between(0.2, 1).all()
    assert table["cka_seeds"].between(0.2, 1).all()


def test_the_adapter_is_at_work_in_what_is_captured(
    store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]
) -> None:
    run = ht.run(make_spec(), store)
    _, tokenizer = ht.load_backbone(run.spec.backbone)
    batches = _batches(run, run.predictions["test"]["rows"][:8], tokenizer)
    model, _, attachment = store.run(run.key).restore()
    with torch.no_grad():
        for name, vector in attachment.named_parameters("adapter").items():
            vector.fill_(3.0 if name.endswith("weight") else 0.5)
    own = _outputs(model, batches)
    with attachment.enabled(False):
        plain = _outputs(model, batches)
    np.testing.assert_allclose(own[0], 3 * plain[0] + 0.5, atol=1e-5)
    merged = _outputs(attachment.merge(), batches)
    for layer in range(len(own)):
        np.testing.assert_allclose(own[layer], merged[layer], atol=1e-4)


def test_padding_is_left_out(store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]) -> None:
    """One text at a time, without any padding, gives the same outputs for the same tokens."""
    run = ht.run(make_spec(adapter=ht.HeadOnly()), store)
    model, tokenizer = ht.load_backbone(run.spec.backbone)
    rows = run.predictions["test"]["rows"][:6]
    batches = _batches(run, rows, tokenizer)
    assert not batches[0]["attention_mask"].all(), "texts of several lengths"
    together, group = _outputs(model, batches), _examples(batches)
    assert not any(part._forward_hooks for part in model.modules()), "nothing watches the model afterwards"
    for example in range(6):
        alone = _outputs(model, _batches(run, rows[example : example + 1], tokenizer))
        for layer in range(len(Sites(model))):
            np.testing.assert_allclose(together[layer][group == example], alone[layer], atol=1e-5)


def test_outputs_of_the_last_few_runs_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run serves as the ceiling of another soon afterwards; older ones are computed again."""
    computed: list[str] = []
    monkeypatch.setattr(module, "_HELD", OrderedDict())
    monkeypatch.setattr(module, "live", lambda run: (run.key,))
    monkeypatch.setattr(module, "_outputs", lambda model, batches: computed.append(model) or [])
    batches = [{"input_ids": torch.tensor([[1, 2]])}]
    for key in ("a", "b", "c", "a", "d", "b", "a"):
        module._outputs_of(SimpleNamespace(key=key), batches)  # type: ignore[arg-type]
    assert computed == ["a", "b", "c", "d", "a"], "d took the place of a, which came first"
    module._outputs_of(SimpleNamespace(key="a"), [{"input_ids": torch.tensor([[1, 3]])}])  # type: ignore[arg-type]
    assert computed == ["a", "b", "c", "d", "a", "a"], "other rows, other outputs"
