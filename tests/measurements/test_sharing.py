"""Shared vectors in whole tiny runs: own ones give the run back, none give HeadOnly, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.measurements import sharing as module
from hadamard_toolkit.measurements.sharing import sharing
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.studies.sharing import BARE, SCHEMES, UNSHARED, Scheme

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
PICKED = [BY_NAME[name] for name in ("own", "mean", "leave-one-out", "shared W, own b", BARE)]


@pytest.fixture
def store(make_spec: Callable[..., ht.RunSpec], tmp_path: Path) -> ht.RunStore:
    """One Hadamard run and its HeadOnly, and a second Hadamard run that will pass for another task's."""
    store = ht.RunStore(tmp_path / "store")
    for adapter, seed in ((ht.Hadamard(), 0), (ht.HeadOnly(), 0), (ht.Hadamard(), 1)):
        ht.run(make_spec(adapter=adapter, seed=seed), store)
    return store


@pytest.fixture
def target(store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]) -> Run:
    return store.run(make_spec().key)


@pytest.fixture
def elsewhere(store: ht.RunStore, make_spec: Callable[..., ht.RunSpec]) -> Iterator[Run]:
    """The run of seed 1 as that of a task of another name; `donors` itself is tested with transplants."""
    other = store.run(make_spec(seed=1).key)
    posing = replace(other, spec=replace(other.spec, task="rte"))
    with patch.object(module, "donors", lambda run, store: [posing]):
        yield posing


def test_the_schemes_of_a_run(
    store: ht.RunStore, target: Run, elsewhere: Run, make_spec: Callable[..., ht.RunSpec]
) -> None:
    table = sharing(target, store, schemes=PICKED).set_index("scheme")
    assert table.index.tolist() == [UNSHARED, *(scheme.name for scheme in PICKED)]
    assert table.loc[UNSHARED, "score"] == target.score
    head_only = store.run(make_spec(adapter=ht.HeadOnly()).key)
    assert table.loc[BARE, "score"] == head_only.score
    assert table.loc[BARE, "validation"] == head_only.metrics["validation"]["accuracy"]
    whole = int(target.counts.drop(index="head")["stored"].sum())
    assert table.loc["own", "parameters"] == table.loc[UNSHARED, "parameters"] == whole
    assert table.loc["mean", "parameters"] == whole / 2
    assert table.loc["shared W, own b", "parameters"] == whole / 4 + whole / 8 + whole / 4
    model, _, _ = target.restore()
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert table["percent"].to_numpy() == pytest.approx(100 * table["parameters"].to_numpy() / backbone)
    assert set(table["tasks"]) == {2}
    assert set(table["with"]) == {"rte"}
    assert set(table["n"]) == {40}
    assert table.loc["leave-one-out", ["weight", "bias", "norm"]].tolist() == ["others"] * 3


def test_the_vectors_are_at_work_when_the_head_trains(
    store: ht.RunStore, target: Run, elsewhere: Run
) -> None:
    """With one other task, "leave-one-out" is its vectors: the head must see the backbone with exactly those in it."""
    seen = []

    def look(attachment: ht.Attachment, *args: object, **kwargs: object) -> None:
        seen.append({name: p.detach().clone() for name, p in attachment.model.named_parameters()})
        raise StopIteration

    with patch.object(module, "retrain_head", look), pytest.raises(StopIteration):
        sharing(target, store, schemes=[BY_NAME["leave-one-out"]])
    assert elsewhere.folder is not None
    attachment = store.run(elsewhere.folder.name).restore()[2]
    merged = dict(attachment.merge().named_parameters())
    body = [name for name in seen[0] if name.startswith("bert.")]
    assert len(body) > 10
    for name in body:
        np.testing.assert_allclose(seen[0][name].numpy(), merged[name].detach().numpy(), atol=1e-6)


def test_who_cannot_share_is_told(
    store: ht.RunStore, target: Run, elsewhere: Run, make_spec: Callable[..., ht.RunSpec]
) -> None:
    with pytest.raises(UnsupportedError, match="Hadamard adapter"):
        sharing(store.run(make_spec(adapter=ht.HeadOnly()).key), store)
    with pytest.raises(DataError, match="no run like"):
        sharing(target, store, tasks=["cola"])


def test_those_alike_have_the_same_labels(store: ht.RunStore, target: Run, elsewhere: Run) -> None:
    """`elsewhere` passes for RTE, whose labels are others; under the name of SST-2's own labels it is let in."""
    seen = []

    def look(run: Run, store: ht.RunStore, *, tasks: set[str], schemes: list[Scheme]) -> None:
        seen.append((tasks, {scheme.name for scheme in schemes}))

    own = module.load_task
    labels = {"rte": ("yes", "no")}

    def load(name: str) -> object:
        task = own("sst2")
        return replace(task, name=name, labels=labels.get(name, task.labels))

    with patch.object(module, "sharing", look), patch.object(module, "load_task", load):
        module.sharing_alike(target, store)
        labels.clear()
        module.sharing_alike(target, store)
    assert [tasks for tasks, _ in seen] == [set(), {"rte"}]
    assert {"mean", "leave-one-out", "another task"} <= seen[0][1]
    assert not {"own", BARE, "permuted"} & seen[0][1]
