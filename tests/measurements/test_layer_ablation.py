"""What removal measures is what the model says when layers go back to the backbone, on the rows of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.measurements import layer_ablation as module
from hadamard_toolkit.measurements.layer_ablation import removal, taylor
from hadamard_toolkit.studies.layer_ablation import layer_importance, read_correct, read_kept, removal_paths
from hadamard_toolkit.studies.sufficient import smallest_set
from hadamard_toolkit.studies.tables import measured_table, vector_table
from hadamard_toolkit.training.batching import Padding, tokenise
from tests.runs.conftest import PROTOCOL, backbone_folder, data_root, make_spec

__all__ = ["backbone_folder", "data_root", "make_spec"]
Make = Callable[..., ht.RunSpec]
LEARNING = replace(PROTOCOL, epochs=3, learning_rate=0.05)  # so far that removing a layer changes predictions


@pytest.fixture
def store(tmp_path: Path) -> ht.RunStore:
    return ht.RunStore(tmp_path / "store")


@pytest.fixture
def run(make_spec: Make, store: ht.RunStore) -> ht.RunSpec:
    spec = make_spec(protocol=LEARNING)
    ht.run(spec, store)
    return spec


def logits(run, split: str, kept: tuple[int, ...]) -> np.ndarray:  # type: ignore[no-untyped-def]
    """By hand: W, b and norms of the layers that are not kept are set to the backbone's, all else is as trained."""
    model, tokenizer, attachment = run.restore()
    plain, _ = ht.load_backbone(run.spec.backbone)
    originals = dict(plain.named_parameters())
    for layer in range(3):
        if layer in kept:
            continue
        with torch.no_grad():
            for name, parameter in attachment.named_parameters("adapter").items():
                if f".layers.{layer}." in name:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            for tuning in attachment.tunings:
                if tuning.layer == layer:
                    model.get_parameter(tuning.path).copy_(originals[tuning.path])
    task = ht.load_task("sst2")
    rows = task.splits["train" if split == "validation" else "test"].select(run.predictions[split]["rows"])
    examples = tokenise(rows, task.text_columns, tokenizer, 24)
    batch = Padding(tokenizer)(examples.__getitems__(range(len(examples))))
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k not in ("row", "labels")}).logits.numpy()


def test_every_subset_is_scored_as_if_set_by_hand(run: ht.RunSpec, store: ht.RunStore) -> None:
    done = store.run(run.key)
    table = store.measured(run.key, "removal", lambda: removal(done, store))
    assert len(table) == 2 * 2**3
    assert set(table["drawn"]) == {"all"}
    assert not table.duplicated(["kept", "split"]).any()
    everything = table.set_index(["split", "kept"])
    for split in ("validation", "test"):
        labels = done.predictions[split]["labels"]
        full = logits(done, split, (0, 1, 2)).argmax(axis=1)
        np.testing.assert_array_equal(full, done.predictions[split]["logits"].argmax(axis=1))
        for kept in ("0,1,2", "0,2", "1", ""):
            row = everything.loc[(split, kept)]
            by_hand = logits(done, split, read_kept(kept))
            right = by_hand.argmax(axis=1) == labels
            np.testing.assert_array_equal(read_correct(row["correct"], int(row["n"])), right)
            assert row["score"] == pytest.approx(right.mean())
            assert row["changed"] == (by_hand.argmax(axis=1) != full).sum()
            loss = torch.nn.functional.cross_entropy(torch.tensor(by_hand), torch.tensor(labels))
            assert row["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert everything["changed"].max() > 0, "the run moved so little that nothing was tested"

    again = measured_table(store, "removal")
    assert again[["task", "method", "seed"]].drop_duplicates().values.tolist() == [["sst2", "Hadamard", 0]]
    paths = removal_paths(again)
    assert set(paths["rule"]) == {"greedy", "first", "last"}
    assert smallest_set(again, paths, margin=0.1)["n_test"].item() == 40


def test_deeper_models_get_rules_and_shared_random_subsets(
    run: ht.RunSpec, store: ht.RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LAYERS", 2)
    monkeypatch.setattr(module, "RANDOM_SUBSETS", 2)
    table = removal(store.run(run.key), store)
    test = table[table["split"] == "test"].set_index("kept")
    assert {"0,1,2", "0,1", "0,2", "1,2", "0", "2", ""} <= set(test.index)
    random = test[test["drawn"] == "random"].index
    assert sorted(len(read_kept(kept)) for kept in random) == [1, 1, 2, 2]
    one_run = table.assign(key=run.key, task="t", seed=0)
    norms = layer_importance(vector_table(store))
    norms = norms[(norms["vector"] == "both") & (norms["key"] == run.key)].assign(value=lambda t: t["l2"])
    path = removal_paths(one_run, norms[["key", "layer", "value"]])
    assert set(path["rule"]) == {"greedy", "norm", "first", "last"}
    assert set(path["kept"]) <= set(test.index), "what is chosen is scored on test rows"


def test_random_subsets_of_twelve_layers_are_the_same_for_every_run() -> None:
    drawn = module._random_subsets(range(12))
    assert drawn == module._random_subsets(range(12))
    assert sorted(map(len, drawn)) == [6] * 20 + [8] * 20
    assert len(set(drawn)) == 40


def test_test_rows_are_capped_alike_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEST_ROWS", 5)
    rows = module.scored_rows(40)
    assert len(rows) == 5
    assert rows.tolist() == sorted(rows) == module.scored_rows(40).tolist()


def test_taylor_predicts_a_small_step(run: ht.RunSpec, store: ht.RunStore) -> None:
    """Going back by a thousandth of Δ in one layer raises the loss by a thousandth of `increase`."""
    done = store.run(run.key)
    table = taylor(done, store).set_index("layer")
    assert table.index.tolist() == [0, 1, 2]
    assert (table["taylor"] == table["increase"].abs()).all()
    assert (table["n"] == 16).all()
    task, tokenizer, attachment, _ = module._restored(done)
    kind, examples = module._rows(done, "validation", task, tokenizer)
    attachment.model.double()
    change = module._change(attachment)
    named = attachment.named_parameters()

    def loss() -> float:
        batch = kind.collate(examples.__getitems__(range(len(examples))))
        with torch.no_grad():
            return float(attachment.model(**batch_inputs(batch), labels=batch["labels"]).loss)

    def batch_inputs(batch):  # type: ignore[no-untyped-def]
        return {name: value for name, value in batch.items() if name not in ("row", "labels")}

    before = loss()
    for layer in range(3):
        with torch.no_grad():
            for name, moved in change.items():
                if f".layers.{layer}." in name:
                    named[name].sub_(1e-3 * torch.from_numpy(moved))
        assert (loss() - before) / 1e-3 == pytest.approx(table.loc[layer, "increase"], rel=0.05, abs=1e-3)
        with torch.no_grad():
            for name, moved in change.items():
                if f".layers.{layer}." in name:
                    named[name].add_(1e-3 * torch.from_numpy(moved))


def test_what_cannot_be_measured(make_spec: Make, store: ht.RunStore) -> None:
    head = make_spec(adapter=ht.HeadOnly())
    ht.run(head, store)
    with pytest.raises(UnsupportedError, match="layers of Hadamard runs"):
        removal(store.run(head.key), store)
    nothing_held_out = make_spec(protocol=replace(PROTOCOL, validation_rows=0, select="last"))
    ht.run(nothing_held_out, store)
    with pytest.raises(DataError, match="validation_rows > 0"):
        removal(store.run(nothing_held_out.key), store)
    assert isinstance(store.load(), pd.DataFrame)
