"""AdapterFusion from a spec: the single-task adapters are runs of their own, found or made first."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, TrainingError, UnsupportedError
from hadamard_toolkit.runs import fusion_sources
from hadamard_toolkit.runs import run as runs
from hadamard_toolkit.runs.fusion_sources import SourceError, source_specs
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.training.pretraining_step import ContinuedPretraining
from tests.training.tiny import tiny_bert

MakeSpec = Callable[..., RunSpec]
FUSION = ht.AdapterFusion(("SST-2", "cola"), bottleneck=4)


@pytest.fixture
def fusion_spec(
    make_spec: MakeSpec, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeSpec:
    """`make_spec` with a second task beside SST-2: the same rows under the name of CoLA, labels turned."""
    root = tmp_path / "two"
    shutil.copytree(data_root, root)
    (root / "glue" / "CoLA").mkdir()
    for stem in ("train", "dev"):
        table = pq.read_table(root / "glue" / "SST-2" / f"{stem}.parquet")
        turned = pa.array([1 - label for label in table["label"].to_pylist()], pa.int64())
        pq.write_table(
            table.set_column(table.column_names.index("label"), "label", turned),
            root / "glue" / "CoLA" / f"{stem}.parquet",
        )
    monkeypatch.setenv("HADAMARD_DATA", str(root))
    return lambda **changes: make_spec(**{"adapter": FUSION, **changes})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the runs that were trained, in order."""
    keys: list[str] = []
    original = runs._train_over

    def note(spec: RunSpec, under: Any) -> Any:
        keys.append(spec.key)
        return original(spec, under)

    monkeypatch.setattr(runs, "_train_over", note)
    return keys


def loaded(attachment: ht.Attachment, task: str) -> dict[str, torch.Tensor]:
    """The adapter of one task in a fusion, by its names as a `Pfeiffer`."""
    mark = f".tasks.{task}."
    return {n.replace(mark, "."): v for n, v in attachment.state_dict().items() if mark in n}


def test_both_phases_are_runs(fusion_spec: MakeSpec, tmp_path: Path, trained: list[str]) -> None:
    spec, store = fusion_spec(seed=2), RunStore(tmp_path / "store", keep="everything")
    needed = source_specs(spec)
    assert {name: (s.task, s.adapter, s.protocol, s.seed) for name, s in needed.items()} == {
        "SST-2": ("sst2", ht.Pfeiffer(bottleneck=4), spec.protocol, 2),
        "cola": ("cola", ht.Pfeiffer(bottleneck=4), spec.protocol, 2),
    }
    before = run(needed["cola"], store)  # one is there, the other is made
    done = run(spec, store)
    keys = {name: s.key for name, s in needed.items()}
    assert trained == [keys["cola"], keys["SST-2"], spec.key]
    assert store.keys() == sorted([*keys.values(), spec.key])

    record = json.loads((store.folder / spec.key / "run.json").read_text())
    noted = record["train_info"]["sources"]
    assert {name: source["key"] for name, source in noted.items()} == keys
    assert [source["weights"] for source in noted.values()] == ["trained with this run", "store"]
    assert noted["SST-2"]["accuracy"] == store.run(keys["SST-2"]).score
    # Q, K, V of three layers of width 16; stored with two adapters of 2 x 16 x 4 + 16 + 4
    assert record["counts"]["adapter"]["trained"] == 3 * 3 * 16 * 16
    assert record["counts"]["adapter"]["stored"] == 3 * (3 * 16 * 16 + 2 * 148)

    assert done.attachment is not None
    for name, key in keys.items():  # frozen throughout, so they are as their runs left them
        single = store.run(key).restore()[2].state_dict()
        under = loaded(done.attachment, name)
        assert len(under) == 3 * 4
        assert all(torch.equal(value, single[part]) for part, value in under.items())
        assert any(value.any() for value in under.values())
    query = done.attachment.state_dict()["adapter.layers.0.ffn_residual.query"]
    fresh = ht.attach(store.run(spec.key).restore()[2].detach(), FUSION, seed=2).state_dict()
    assert not torch.equal(query, fresh["adapter.layers.0.ffn_residual.query"]), "phase two has trained"
    assert before.attachment is not None, "what the caller got before is the caller's"

    trained.clear()
    assert run(spec, store).score == done.score
    run(replace(spec, task="cola"), store)
    assert trained == [replace(spec, task="cola").key], "present = done, for sources too"


def test_the_same_bytes_wherever_the_sources_come_from(
    fusion_spec: MakeSpec, tmp_path: Path, trained: list[str]
) -> None:
    """From a store, from memory without one, and from a store that keeps vectors only, twice."""
    spec = fusion_spec()
    keys = [source.key for source in source_specs(spec).values()]
    alone = run(spec)
    assert trained == [*keys, spec.key]
    expected = alone.predictions["test"]["logits"]
    noted = [source["weights"] for source in alone.info["train_info"]["sources"].values()]
    assert noted == ["trained for this run"] * 2

    vectors = RunStore(tmp_path / "vectors", keep="vectors")
    sweep([spec], vectors)
    assert len(vectors) == 3
    assert not list(vectors.folder.glob("*/adapter_model.safetensors"))
    assert {path.name for path in (vectors.folder / ".sources").iterdir()} == set(keys)
    np.testing.assert_array_equal(vectors.run(spec.key).predictions["test"]["logits"], expected)

    trained.clear()
    other = fusion_spec(task="cola")
    run(other, vectors)
    assert trained == [other.key], "trained once for all fusions over them"
    shutil.rmtree(vectors.folder / ".sources")
    shutil.rmtree(vectors.folder / spec.key)
    again = run(spec, vectors)
    assert trained[1:] == [*keys, spec.key], (
        "their weights are gone: they are trained again, their records stay"
    )
    noted = [source["weights"] for source in again.info["train_info"]["sources"].values()]
    assert noted == ["trained again"] * 2
    np.testing.assert_array_equal(again.predictions["test"]["logits"], expected)


def test_a_source_that_fails_is_named_and_not_in_the_way(
    fusion_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = fusion_spec(), RunStore(tmp_path / "store", keep="everything")
    bad = source_specs(spec)["cola"]
    original = runs._train_over

    def diverge(given: RunSpec, under: Any) -> Any:
        if given == bad:
            raise TrainingError("the loss became nan at step 3")
        return original(given, under)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_train_over", diverge)
        with pytest.raises(
            SourceError,
            match=rf"fuses.*task 'cola'.*run {bad.key} failed: TrainingError: the loss became nan",
        ):
            run(spec, store)
    failed = store.failed().set_index("key")["error"].to_dict()
    assert failed == {bad.key: "TrainingError", spec.key: "SourceError"}
    assert store.keys() == [source_specs(spec)["SST-2"].key], "what was done stays done"
    run(spec, store)
    assert (len(store), len(store.failed())) == (3, 0)


def test_a_source_in_the_hands_of_another_is_waited_for(
    fusion_spec: MakeSpec, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose process died is taken over: its claim is gone with it."""
    spec, store = fusion_spec(), RunStore(tmp_path / "store", keep="everything")
    first, second = source_specs(spec).values()
    monkeypatch.setattr(fusion_sources, "POLL_SECONDS", 0.01)
    finished = run(first)
    trained.clear()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            store.add(finished)
            release.set()
            holder.join()

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.claim(first) as mine:
            assert mine
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    monkeypatch.setattr(fusion_sources.time, "sleep", wait)
    run(spec, store)
    assert waits == [0.01, 0.01]
    assert trained == [second.key, spec.key], "the other one's result is used"


def test_a_sparse_fusion_prunes_its_own_projections(fusion_spec: MakeSpec, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "store", keep="everything")
    for control in (None, "reinitialised"):
        sparsity = Sparsity("snip", 0.5, examples=16, batch_size=8, control=control)
        done = run(fusion_spec(sparsity=sparsity), store)
        assert done.attachment is not None
        masks = ht.Masks.of(done.attachment)
        assert (masks.entries, masks.removed) == (3 * 3 * 256, 3 * 3 * 128)
        assert not any("tasks" in name for name in masks.kept)
        for name, mask in masks.kept.items():
            assert not done.attachment.state_dict()[name][~mask].any()
        for name, source in source_specs(done.spec).items():
            assert source.sparsity is None
            single = store.run(source.key).restore()[2].state_dict()
            assert all(torch.equal(v, single[n]) for n, v in loaded(done.attachment, name).items())
    assert len(store) == 4, "the sources are shared"


def test_what_cannot_be_fused_is_refused(
    fusion_spec: MakeSpec, tmp_path: Path, backbone_folder: Path
) -> None:
    store = RunStore(tmp_path / "store", keep="everything")
    with pytest.raises(UnsupportedError, match=r"cannot be run from a spec.*stands alone"):
        run(fusion_spec(adapter=ht.Stack(ht.LoRA(), FUSION)), store)
    with pytest.raises(ArgumentError, match=r"tasks=\('movies',\).*must be tasks.*no known task"):
        run(fusion_spec(adapter=ht.AdapterFusion(("movies",))), store)
    with pytest.raises(ArgumentError, match="name one task twice"):
        run(fusion_spec(adapter=ht.AdapterFusion(("sst2", "SST-2"))), store)
    protocol = replace(fusion_spec().protocol, pretraining=(ContinuedPretraining(),))
    with pytest.raises(UnsupportedError, match=r"text='task'.*name the text"):
        run(fusion_spec(protocol=protocol), store)
    assert len(store) == 0
    assert source_specs(fusion_spec(adapter=ht.Pfeiffer())) == {}

    folder = tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    spec = fusion_spec(backbone=str(folder), adapter=ht.AdapterFusion(("sst2",), bottleneck=4))
    [source] = source_specs(spec).values()
    run(source, store)
    cast(PreTrainedModel, tiny_bert(seed=9).base_model).save_pretrained(folder)
    with pytest.raises(
        DataError, match=f"run {source.key} was made from other content.*backbone .*set such runs aside"
    ):
        run(spec, store)
