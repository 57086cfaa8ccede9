"""Bases from a store of tiny runs: what each kind is made of, and the runs that train in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.bank import banks, run_bank
from hadamard_toolkit.runs.plan import load_plan, plan_text
from hadamard_toolkit.studies import coefficient_scores, subspace_plan, task_basis, vector_table
from hadamard_toolkit.studies.how_many import HEAD, UNSHARED
from hadamard_toolkit.studies.subspace import KINDS, _worth
from hadamard_toolkit.tasks.registry import TASKS
from tests.runs.conftest import PROTOCOL
from tests.training.tiny import tiny_task

NAMES = ("one", "two", "three")
VECTORS, NORMS = ht.Hadamard(norm=None), ht.LayerNormTuning(norm="both")


def small_task(number: int) -> ht.Task:
    """The same question about other rows."""
    return replace(tiny_task(train=64 + 8 * number, test=20), name=NAMES[number])


@pytest.fixture(scope="module")
def store(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ht.RunStore]:
    folder = tmp_path_factory.mktemp("subspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAMARD_CACHE", str(folder / "cache"))
        for number, name in enumerate(NAMES):
            patch.setitem(TASKS, name, lambda root, number=number: small_task(number))
        store = ht.RunStore(folder / "runs", keep="vectors")
        specs = [
            ht.RunSpec(str(backbone_folder), task, adapter, PROTOCOL, seed=seed)
            for task in NAMES
            for adapter in (VECTORS, NORMS)
            for seed in (0, 1)
        ]
        # A second rate that was tried with one seed only.
        specs.append(replace(specs[0], protocol=replace(PROTOCOL, learning_rate=0.5)))
        assert set(ht.sweep(specs, store)["status"]) == {"done"}
        yield store


def plan(store: ht.RunStore, **changes: Any) -> list[ht.RunSpec]:
    backbone = store.run(store.keys()[0]).spec.backbone
    choices = {"tasks": NAMES, "ks": (1, 2, 4), "seeds": (0, 1), "learning_rate": 0.1, "backbone": backbone}
    return subspace_plan(store, **{**choices, **changes})


def inside(spec: ht.RunSpec) -> bool:
    return isinstance(spec.adapter, ht.Subspace)


def basis_of(store: ht.RunStore, kind: str, task: str = "one", seed: int = 0) -> ht.Basis:
    [name] = {
        spec.adapter.basis
        for spec in plan(store, tasks=(task,), kinds=(kind,), ks=(1,), seeds=(seed,))
        if isinstance(spec.adapter, ht.Subspace)
    }
    return ht.load_basis(name)


def matrix(basis: ht.Basis, vectors: tuple[str, ...] = ("bias", "weight")) -> np.ndarray:
    """The directions as rows, in the order of `task_basis`."""
    names = [f"layers.{layer}.attention_output.{vector}" for vector in vectors for layer in range(3)]
    return torch.cat([basis.directions[name] for name in names], 1).double().numpy()


def picked(store: ht.RunStore) -> ht.RunStore:
    """Without the rate that was tried once."""
    keys = [key for key in store.load()["key"].unique() if store.run(key).spec.adapter == VECTORS]
    return store.only([key for key in keys if store.run(key).spec.protocol == PROTOCOL])


def test_other_tasks_give_their_principal_directions_times_one_scale(store: ht.RunStore) -> None:
    basis = basis_of(store, "other tasks")
    rows, made = matrix(basis), basis.made
    expected = task_basis(vector_table(picked(store)), "one")
    assert rows.shape == expected.shape == (2, 96)
    np.testing.assert_allclose(np.abs((rows / made["scale"] * expected).sum(axis=1)), 1, atol=1e-4)
    assert (made["kind"], made["task"], made["tasks"]) == ("other tasks", "one", ["three", "two"])
    assert len(made["sources"]) == 4
    assert {store.run(key).spec.task for key in made["sources"]} == {"two", "three"}
    assert made["seed"] is None
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    assert (largest > 0).all(), "the sign of a direction does not depend on the machine"


def test_the_nulls_keep_the_scale_and_lose_the_directions(store: ht.RunStore) -> None:
    found = basis_of(store, "other tasks")
    for kind in ("permuted", "random"):
        null = basis_of(store, kind)
        assert null.made["scale"] == pytest.approx(found.made["scale"], rel=1e-6)
        rows = matrix(null)
        np.testing.assert_allclose(rows @ rows.T, np.eye(2) * null.made["scale"] ** 2, atol=1e-5)
        assert np.abs(rows @ matrix(found).T).max() < 0.6 * null.made["scale"] ** 2
        assert not np.array_equal(rows, matrix(basis_of(store, kind, seed=1))), "drawn anew for every seed"
        other = basis_of(store, kind, task="two")
        alike = matrix(other) @ rows.T / (other.made["scale"] * null.made["scale"])
        assert np.abs(alike).max() < 0.9, "and for every task"
        assert null.made["seed"] == 0


def test_permuted_directions_hold_the_same_values_in_other_places(store: ht.RunStore) -> None:
    """With one direction, it is the permuted mean itself; W and b of a layer move alike."""
    two = [key for key in store.load()["key"].unique() if store.run(key).spec.task != "three"]
    part = store.only(two)
    found, null = (matrix(basis_of(part, kind))[0] for kind in ("other tasks", "permuted"))
    sign = np.sign(found[np.abs(found).argmax()] * null[np.abs(null).argmax()])
    pairs = [
        np.stack(np.split(row.reshape(6, 16), 2), axis=-1) for row in (found, sign * null)
    ]  # layer, coordinate
    for layer in range(3):
        ordered = [pair[layer][np.argsort(pair[layer][:, 0])] for pair in pairs]
        np.testing.assert_allclose(*ordered, atol=1e-6)
        assert not np.allclose(pairs[0][layer], pairs[1][layer])


def test_own_seeds_are_the_other_seeds_of_the_task(store: ht.RunStore) -> None:
    basis = basis_of(store, "own seeds", seed=1)
    [key] = basis.made["sources"]
    assert (store.run(key).spec.task, store.run(key).spec.seed) == ("one", 0)
    assert store.run(key).spec.protocol == PROTOCOL
    change = store.vectors(key)["attention_output.weight"].astype(float) - 1
    rows = matrix(basis, vectors=("weight",))
    assert rows.shape[0] == 1
    np.testing.assert_allclose(np.abs(rows[0]), np.abs(change.ravel()), atol=1e-6)


def test_norm_changes_are_those_of_the_norms(store: ht.RunStore) -> None:
    basis = basis_of(store, "norm changes")
    assert len(basis.directions) == 3 * 2 * 2
    assert {store.run(key).spec.adapter for key in basis.made["sources"]} == {NORMS}
    assert 0 < basis.made["scale"] < 1, "what changed, not the norms themselves"


def test_the_plan_has_one_run_per_task_seed_kind_and_k(store: ht.RunStore) -> None:
    specs = plan(store, kinds=KINDS)
    assert len(specs) == len(set(specs)) == 3 * 2 * (1 + 4 * 2 + 1), "two directions; one of own seeds"
    inside = [spec for spec in specs if isinstance(spec.adapter, ht.Subspace)]
    assert {spec.protocol for spec in inside} == {replace(PROTOCOL, learning_rate=0.1)}
    others = [spec for spec in specs if spec not in inside]
    assert {(spec.adapter, spec.protocol) for spec in others} == {(ht.HeadOnly(), PROTOCOL)}
    assert {spec.adapter.wrapped for spec in inside} == {VECTORS, NORMS}  # type: ignore[attr-defined]
    assert plan(store, kinds=KINDS) == specs


def test_the_plan_can_be_written_and_read(store: ht.RunStore, tmp_path: Path) -> None:
    specs = plan(store)
    (tmp_path / "plan.toml").write_text(plan_text(specs, "What was asked\nand how"))
    assert set(load_plan(tmp_path / "plan.toml")) == set(specs)


def test_its_runs_train_in_one_bank_and_record_the_basis(store: ht.RunStore) -> None:
    specs = [spec for spec in plan(store, ks=(2,), kinds=("other tasks", "random")) if spec.seed == 0]
    specs = [spec for spec in specs if isinstance(spec.adapter, ht.Subspace)]
    assert [len(bank.specs) for bank in banks(specs, 8)] == [6]
    for spec, done in zip(specs, run_bank(specs[:3]), strict=False):
        assert not isinstance(done, Exception), done
        assert done.info["train_info"]["bank"] == 3
        assert done.info["train_info"]["basis"] == ht.load_basis(spec.adapter.basis).made  # type: ignore[attr-defined]
        assert done.counts.loc["adapter", "trained"] == 2


def test_scores_come_from_the_store_with_the_rate_picked_on_held_out_rows(store: ht.RunStore) -> None:
    choices = {"tasks": ("one",), "kinds": ("other tasks",), "ks": (1,)}
    tried = {rate: plan(store, learning_rate=rate, **choices) for rate in (0.1, 0.3)}
    specs = list(dict.fromkeys([*tried[0.1], *tried[0.3]]))
    ht.sweep(specs, store)
    with pytest.raises(DataError, match="no runs of the kind 'unshared'"):
        coefficient_scores(store.only(specs))
    unshared = [key for key in picked(store).load()["key"].unique() if store.run(key).spec.task == "one"]
    scores = coefficient_scores(store.only([*specs, *unshared]))
    assert set(scores.groupby(["kind", "k"]).size().items()) == {
        ((HEAD, 0), 2),
        ((UNSHARED, 96), 2),
        (("other tasks", 1), 2),
    }
    held_out = {
        rate: np.mean([store.run(s.key).metrics["validation"]["accuracy"] for s in runs if inside(s)])
        for rate, runs in tried.items()
    }
    chosen = scores.loc[scores["kind"] == "other tasks", "key"]
    [rate] = {store.run(key).spec.protocol.learning_rate for key in chosen}
    assert held_out[rate] == max(held_out.values())


def test_more_seeds_count_before_a_better_score() -> None:
    def runs(*scores: float) -> list[Any]:
        return [(score, None) for score in scores]

    assert _worth(runs(0.5, 0.5)) > _worth(runs(0.9))
    assert _worth(runs(0.5, 0.7)) > _worth(runs(0.5, 0.6))


def test_what_cannot_be_planned_is_told(store: ht.RunStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no runs of Hadamard\(norm=None\) with weights on task='four'"):
        plan(store, tasks=("four",))
    with pytest.raises(DataError, match="no runs of"):
        plan(store, backbone="minilm-l6")
    with pytest.raises(ArgumentError, match="kinds='own'"):
        plan(store, kinds=("own",))
    with pytest.raises(ArgumentError, match="ks=0"):
        plan(store, ks=(0,))
