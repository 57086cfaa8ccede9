"""A transplant puts the vectors of one run, and nothing else of it, into the model of another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.measurements import cross_task_transfer as module
from hadamard_toolkit.measurements import measure
from hadamard_toolkit.measurements.cross_task_transfer import donors, transplant
from hadamard_toolkit.runs.record import Run
from tests.runs.conftest import PROTOCOL

LOUD = ht.protocols.smoke(
    epochs=2,
    head_epochs=2,
    train_rows=48,
    validation_rows=16,
    test_rows=None,
    max_length=24,
    batch_size=16,
    learning_rate=0.05,
)


@pytest.fixture(scope="module")
def store(
    backbone_folder: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ht.RunStore]:
    """Hadamard runs on SST-2 and, by the name of CoLA, on the same rows, and runs that are no donors."""
    root = tmp_path_factory.mktemp("transplant")
    for name in ("SST-2", "CoLA"):
        shutil.copytree(data_root / "glue" / "SST-2", root / "data" / "glue" / name)
    store, bare = ht.RunStore(root / "store"), str(backbone_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAMARD_DATA", str(root / "data"))
        patch.setenv("HADAMARD_CACHE", str(root / "cache"))
        specs = [
            ht.RunSpec(bare, "sst2", ht.Hadamard(), LOUD),
            ht.RunSpec(bare, "sst2", ht.HeadOnly(), LOUD),
            ht.RunSpec(bare, "cola", ht.Hadamard(), LOUD),
            ht.RunSpec(bare, "cola", ht.Hadamard(), LOUD, seed=1),
            ht.RunSpec(bare, "cola", ht.Hadamard(), PROTOCOL),
            ht.RunSpec(bare, "cola", ht.Hadamard(norm=None), LOUD),
        ]
        ht.sweep(specs, store)
        yield store


def find(store: ht.RunStore, task: str, adapter: Any = ht.Hadamard()) -> Run:  # noqa: B008
    runs = [store.run(key) for key in store.load()["key"].unique()]
    [found] = [
        run
        for run in runs
        if (run.spec.task, run.spec.adapter, run.spec.protocol, run.spec.seed) == (task, adapter, LOUD, 0)
    ]
    return found


def score(table: pd.DataFrame, kind: str, head: str, norms: str | None = "source") -> float:
    rows = table[(table["kind"] == kind) & (table["head"] == head)]
    return float(rows.loc[(rows["norms"] == norms) | (kind == "none"), "score"].item())


def test_own_vectors_are_the_run_and_none_are_the_head_alone(store: ht.RunStore) -> None:
    run = find(store, "sst2")
    table = transplant(run, store, norms=("source", "target"))
    assert score(table, "own", "own") == run.score
    alone = find(store, "sst2", ht.HeadOnly()).score
    # the two stages train the head on the bare backbone first, so there both heads are the head alone
    assert score(table, "none", "own") == score(table, "none", "retrained") == alone
    assert table.groupby("kind").size().to_dict() == {"own": 2, "none": 2, "source": 4, "permuted": 4}
    assert set(table["n"]) == {40}
    [donor] = donors(run, store)
    assert (donor.spec.task, donor.spec.seed, donor.spec.adapter) == ("cola", 0, ht.Hadamard())
    moved = table[table["kind"].isin(["source", "permuted"])]
    assert set(moved["source_key"]) == {donor.key} == {find(store, "cola").key}
    again = store.measured(run.key, "transplant", lambda: transplant(run, store))
    assert again["score"].tolist() == table.query("norms != 'target'")["score"].tolist()


def test_a_donor_on_another_backbone_of_the_same_name_is_refused(store: ht.RunStore, tmp_path: Path) -> None:
    copy = ht.RunStore(shutil.copytree(store.folder, tmp_path / "copy"))
    donor = find(copy, "cola")
    path = copy.folder / donor.key / "run.json"
    record = json.loads(path.read_text())
    record["meta_info"]["backbone"]["sha256"]["model.safetensors"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"run {donor.key} was made from other content.*'model.safetensors'"):
        transplant(find(copy, "sst2"), copy)


def test_what_is_scored_is_the_donor_in_the_target(
    store: ht.RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, donor = find(store, "sst2"), find(store, "cola")
    seen: list[module.State] = []
    merged = module.merged

    def watched(model: Any, run: Run, vectors: module.State) -> Any:
        seen.append(vectors)
        return merged(model, run, vectors)

    monkeypatch.setattr(module, "merged", watched)
    table = transplant(run, store, norms=("source", "target"))
    model, tokenizer, attachment = run.restore()
    own = attachment.state_dict()
    learned = donor.restore()[2].state_dict()
    _, _, taken, kept, permuted, _ = seen
    for name, value in taken.items():
        torch.testing.assert_close(value, learned[name])
        norm = name.startswith("norm.")
        torch.testing.assert_close(kept[name], own[name] if norm else learned[name])
    # the head is the target's: the same by hand, unmerged
    attachment.load_state_dict(dict(taken))
    task = ht.load_task("sst2")
    encoded = tokenizer(list(task.splits["test"]["sentence"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**encoded).logits.argmax(-1).numpy()
    by_hand = float((predicted == np.asarray(task.splits["test"]["label"])).mean())
    assert score(table, "source", "own") == pytest.approx(by_hand)
    # the null: the changes of a layer, all in another order
    blank = ht.attach(attachment.detach(), ht.Hadamard()).state_dict()
    orders = []
    for name, value in permuted.items():
        change, shuffled = learned[name] - blank[name], value - blank[name]
        torch.testing.assert_close(change.sort().values, shuffled.sort().values, atol=1e-6, rtol=0)
        orders.append((name.split(".")[2], (change[None] - shuffled[:, None]).abs().argmin(1).tolist()))
    first = dict(orders)
    assert all(order == first[layer] for layer, order in orders), "one permutation for all vectors of a layer"
    assert len({tuple(order) for order in first.values()}) == len(first), "and another for every layer"


def test_the_model_is_as_it_was_after_vectors_were_merged(store: ht.RunStore) -> None:
    """Also where the block fails."""
    run = find(store, "sst2")
    model, _, attachment = run.restore()
    vectors = {k: v for k, v in attachment.state_dict().items() if not k.startswith("head.")}
    attachment.detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail() -> None:
        with module.merged(model, run, vectors) as bare:
            bare.load_state_dict({name: value + 1 for name, value in bare.state_dict().items()})
            changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
            assert {name.split(".")[0] for name in changed} == {"bert", "classifier"}
            raise StopIteration

    with pytest.raises(StopIteration):
        fail()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_runs_without_vectors_are_refused(store: ht.RunStore) -> None:
    with pytest.raises(UnsupportedError, match="Hadamard"):
        transplant(find(store, "sst2", ht.HeadOnly()), store)
    with pytest.raises(ArgumentError, match="norms='own'"):
        transplant(find(store, "sst2"), store, norms=("own",))


@pytest.mark.parametrize("measurement", ["attention", "transplant", "removal"])
def test_spans_are_refused(measurement: str, store: ht.RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find(store, "cola", ht.Hadamard(norm=None))  # one that nobody has measured
    about = {**run.info["meta_info"], "task": {**run.info["meta_info"]["task"], "head": "span"}}
    run = replace(run, info={**run.info, "meta_info": about})
    monkeypatch.setattr(
        "hadamard_toolkit.tasks.registry.load_task", lambda name: SimpleNamespace(name=name, kind="span")
    )
    with pytest.raises(UnsupportedError, match="span"):
        measure(measurement, run, store)
