from __future__ import annotations

from pathlib import Path

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs import reference as module
from hadamard_toolkit.runs.plan import load_plan


@pytest.fixture(autouse=True)
def no_store_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HADAMARD_STORE", raising=False)


def test_the_committed_runs_of_one_plan_and_of_two(repository: Path) -> None:
    folder = repository / "data" / "reference_runs"
    layers, zoo = ht.reference("layers"), ht.reference("zoo")
    assert layers.folder == folder
    assert set(layers.keys()) <= {spec.key for spec in load_plan(folder / "layers.toml")}
    assert len(layers) > 0
    both = ht.reference("layers", "zoo")
    assert set(both.keys()) == set(layers.keys()) | set(zoo.keys())
    assert set(both.keys()) < set(ht.reference().keys())


def test_a_plan_that_is_not_there_is_refused_with_the_plans_that_are() -> None:
    with pytest.raises(ArgumentError, match=r"plan='spines' is not allowed; .*'spine'"):
        ht.reference("layers", "spines")


def test_a_store_of_ones_own_comes_first_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_STORE", str(tmp_path))
    assert ht.reference("spine").folder == tmp_path
    assert len(ht.reference("layers", own=False)) > 0
    monkeypatch.setattr(module, "in_checkout", lambda: False)
    assert ht.reference("spine").folder == tmp_path


def test_outside_a_checkout_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_checkout", lambda: False)
    with pytest.raises(ArgumentError, match="HADAMARD_STORE"):
        ht.reference("spine")
