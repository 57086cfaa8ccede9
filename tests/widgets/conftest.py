"""A tiny trained run in a store, shared by the tests of the pruner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets.pruner import LayerPruner
from tests.runs.conftest import PROTOCOL, backbone_folder, data_root

__all__ = ["backbone_folder", "data_root"]


@pytest.fixture(scope="package")
def tiny_spec(
    backbone_folder: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunSpec]:
    """Hadamard on a tiny backbone; data and cache are its own, and no other folder's tests see them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAMARD_DATA", str(data_root))
        patch.setenv("HADAMARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield RunSpec(str(backbone_folder), "sst2", ht.Hadamard(), PROTOCOL)


@pytest.fixture(scope="package")
def store(tiny_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """That run, done, with vectors that moved far enough for layers to matter."""
    store = RunStore(tmp_path_factory.mktemp("store"))
    for seed in (0, 1):
        ht.run(shifted(tiny_spec, seed), store)
    return store


def shifted(spec: RunSpec, seed: int) -> RunSpec:
    """The spec with a rate and epochs under which the layers of the tiny model come to matter."""
    changes = {"learning_rate": 0.1, "epochs": 8, "head_epochs": 4, "train_rows": 64, "validation_rows": 32}
    return replace(spec, seed=seed, protocol=replace(spec.protocol, **changes))  # type: ignore[arg-type]


@pytest.fixture
def run(store: RunStore, tiny_spec: RunSpec) -> Run:
    """The first of them, read back."""
    return store.run(shifted(tiny_spec, 0).key)


@pytest.fixture
def pruner(run: Run, tmp_path: Path) -> Iterator[LayerPruner]:
    with LayerPruner(run, store=tmp_path / "runs", figures=tmp_path / "figures") as pruner:
        yield pruner
