"""A tiny backbone in a folder and a tiny SST-2 in parquet: whole runs in a fraction of a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.training.protocols import smoke
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

PROTOCOL = smoke(
    epochs=1, head_epochs=2, train_rows=48, validation_rows=16, test_rows=None, max_length=24, batch_size=16
)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers with its tokenizer, without a head."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    tiny_bert().base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 96 training and 40 test rows under the name of SST-2."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "glue" / "SST-2"
    folder.mkdir(parents=True)
    splits = tiny_task(train=96, test=40).splits
    for split, stem in (("train", "train"), ("test", "dev")):
        rows = splits[split]
        table = {"sentence": list(rows["text"]), "label": pa.array(rows["label"], pa.int64())}
        pq.write_table(
            pa.table({**table, "idx": pa.array(range(len(rows)), pa.int32())}), folder / f"{stem}.parquet"
        )
    return root


@pytest.fixture
def make_spec(
    backbone_folder: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunSpec]:
    """`make_spec(**changes)`: a spec on the tiny backbone and task, with data and cache to itself."""
    monkeypatch.setenv("HADAMARD_DATA", str(data_root))
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))

    def make(**changes: Any) -> RunSpec:
        spec = RunSpec(str(backbone_folder), "sst2", ht.Hadamard(), PROTOCOL)
        return replace(spec, **changes)

    return make


@pytest.fixture
def done(make_spec: Callable[..., RunSpec], tmp_path: Path) -> RunStore:
    """A store with one real run."""
    store = RunStore(tmp_path / "runs")
    run(make_spec(), store)
    return store


def copies(store: RunStore, count: int) -> list[RunSpec]:
    """The one run of the store under `count` further seeds."""
    (key,) = store.keys()
    template = store.folder / key
    text = (template / "run.json").read_text()
    spec = RunSpec.from_dict(json.loads(text)["spec"])
    specs = [replace(spec, seed=seed) for seed in range(1, count + 1)]
    for other in specs:
        folder = store.folder / other.key
        shutil.copytree(template, folder)
        record = json.loads(text)
        record |= {"spec": other.to_dict(), "key": other.key}
        record["metrics"]["test"]["accuracy"] = other.seed / 1000
        (folder / "run.json").write_text(json.dumps(record))
    return specs
