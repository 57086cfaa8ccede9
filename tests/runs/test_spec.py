from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.spec import RunSpec, canonical_json, key_of
from hadamard_toolkit.training.protocol import LATER, Protocol

ADAPTERS = st.one_of(
    st.builds(
        ht.Hadamard,
        layers=st.one_of(st.just("all"), st.lists(st.integers(0, 11), min_size=1, max_size=12).map(tuple)),
        placement=st.sampled_from(["attention_output", "attention_heads"]),
        norm=st.sampled_from([None, "attention", "output", "both"]),
        vectors=st.sampled_from([("weight",), ("bias",), ("weight", "bias")]),
    ),
    st.builds(ht.LayerNormTuning, norm=st.sampled_from(["attention", "output", "both"])),
    st.just(ht.HeadOnly()),
    st.just(ht.FullFineTuning()),
    st.builds(lambda rank: ht.Stack(ht.Hadamard(), ht.LoRA(rank=rank)), st.integers(1, 64)),
)
PROTOCOLS = st.builds(
    Protocol,
    head=st.sampled_from(["trained", "frozen-random", "first-then-frozen"]),
    learning_rate=st.floats(1e-8, 10, allow_nan=False),
    epochs=st.integers(1, 100),
    weight_decay=st.floats(0, 1),
    clip=st.one_of(st.none(), st.floats(0.01, 10)),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    train_rows=st.one_of(st.none(), st.integers(1, 10_000)),
)
SPECS = st.builds(
    RunSpec,
    backbone=st.text(min_size=1),
    task=st.sampled_from(["sst2", "stsb", "my own task"]),
    adapter=ADAPTERS,
    protocol=PROTOCOLS,
    sparsity=st.one_of(
        st.none(), st.fixed_dictionaries({"scorer": st.just("snip"), "sparsity": st.floats(0, 0.99)})
    ),
    seed=st.integers(0, 2**32 - 1),
)


def spec(**changes: Any) -> RunSpec:
    return replace(RunSpec("minilm-l6", "sst2", ht.Hadamard(), Protocol()), **changes)


def test_canonical_json_is_one_text() -> None:
    value = {"b": (1, 2.5, None), "a": {"y": True, "x": 1e-8, "é": "é"}}
    assert canonical_json(value) == '{"a":{"x":1e-08,"y":true,"\\u00e9":"\\u00e9"},"b":[1,2.5,null]}'
    assert canonical_json({"n": np.float32(0.5), "m": np.int64(3)}) == '{"m":3,"n":0.5}'


def test_whole_floats_are_integers_as_far_as_floats_count() -> None:
    values = [2.0, -0.0, 0.5, 2.0**53 - 1, 2.0**53, -(2.0**53)]
    assert canonical_json(values) == "[2,0,0.5,9007199254740991,9007199254740992.0,-9007199254740992.0]"


def test_key_of_plain_data_never_changes() -> None:
    # Stores on other machines depend on these digits: a change here orphans their runs, so raise SCHEMA instead.
    assert key_of({"schema": 1, "x": [1.0, 0.1, "é", None, True]}) == "5742a575c08ca63b"
    assert key_of({"x": [1, 0.1, "é", None, True], "schema": 1}) == "5742a575c08ca63b"


def test_golden_spec() -> None:
    golden = spec(adapter=ht.Hadamard(layers=(0, 3)), seed=7)
    data = golden.to_dict()
    assert golden.to_json() == json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert data.pop("protocol") == {
        field.name: list(value) if isinstance(value := getattr(Protocol(), field.name), tuple) else value
        for field in fields(Protocol)
        if field.name not in LATER
    }
    assert json.dumps(data, sort_keys=True) == (
        '{"adapter": {"adapter": "Hadamard", "layers": [0, 3], "norm": "attention", "placement": "attention_output", '
        '"vectors": ["weight", "bias"]}, "backbone": "minilm-l6", "schema": 1, "seed": 7, "sparsity": null, '
        '"task": "sst2"}'
    )
    assert golden.key == "5c91c8525f2f6a19"


@given(SPECS)
def test_round_trip_keeps_the_spec_and_its_key(given_spec: RunSpec) -> None:
    again = RunSpec.from_dict(json.loads(given_spec.to_json()))
    assert again == given_spec
    assert hash(again) == hash(given_spec)
    assert (again.key, again.to_json()) == (given_spec.key, given_spec.to_json())
    assert (again.adapter, again.protocol) == (given_spec.adapter, given_spec.protocol)
    assert pickle.loads(pickle.dumps(given_spec)).key == given_spec.key


@given(SPECS, SPECS)
def test_keys_agree_exactly_when_specs_do(one: RunSpec, other: RunSpec) -> None:
    same = one.to_dict() == other.to_dict()
    assert (one == other) == (one.key == other.key) == same


def test_every_field_moves_the_key() -> None:
    changes: list[dict[str, Any]] = [
        {"backbone": "mpnet-base"},
        {"task": "rte"},
        {"adapter": ht.Hadamard(norm=None)},
        {"adapter": ht.HeadOnly()},
        {"protocol": Protocol(epochs=11)},
        {"protocol": Protocol(frozen_prefix="cached")},
        {"sparsity": {"scorer": "snip", "sparsity": 0.5}},
        {"seed": 1},
    ]
    keys = {spec().key, *(spec(**change).key for change in changes)}
    assert len(keys) == len(changes) + 1


def test_equal_numbers_are_equal_specs() -> None:
    assert spec(protocol=Protocol(clip=1)).key == spec(protocol=Protocol(clip=1.0)).key
    assert spec(protocol=Protocol(weight_decay=0)).key == spec(protocol=Protocol(weight_decay=0.0)).key


def test_spellings_of_a_task_share_a_key() -> None:
    assert spec(task="SST-2") == spec(task="glue/sst2") == spec(task="sst2")
    assert spec(task="nowhere registered").task == "nowhere registered"


def test_sparsity_is_generic() -> None:
    @dataclass(frozen=True)
    class Pruning:
        scorer: str
        sparsity: float

        def to_dict(self) -> dict[str, Any]:
            return {"scorer": self.scorer, "sparsity": self.sparsity}

    plain = {"sparsity": 0.5, "scorer": "snip"}
    given_spec = spec(sparsity=plain)
    assert given_spec.key == spec(sparsity=Pruning("snip", 0.5)).key
    key = given_spec.key
    plain["sparsity"] = 0.9
    assert given_spec.key == key
    assert given_spec.to_dict()["sparsity"]["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": ""}, "backbone='' is not allowed"),
        ({"task": None}, "task=None is not allowed"),
        ({"adapter": "Hadamard"}, "adapter='Hadamard' is not allowed"),
        ({"adapter": ht.Hadamard}, "adapter=<class"),
        ({"protocol": "hadamard"}, "protocol='hadamard' is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed; it must be >= 0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": True}, "seed=True is not allowed"),
        ({"seed": 1.5}, "seed=1.5 is not allowed"),
        ({"sparsity": {"s": float("nan")}}, r"sparsity.s=nan is not allowed"),
        ({"sparsity": {"s": [float("inf")]}}, r"sparsity.s\[0\]=inf is not allowed"),
        ({"sparsity": {"s": {1, 2}}}, "cannot be written as JSON"),
    ],
)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        spec(**changes)


def test_from_dict_refuses_what_it_does_not_know() -> None:
    data = spec().to_dict()
    with pytest.raises(ArgumentError, match="schema=2 is not allowed"):
        RunSpec.from_dict(data | {"schema": 2})
    with pytest.raises(ArgumentError, match="no field 'colour'"):
        RunSpec.from_dict(data | {"colour": "red"})
    with pytest.raises(ArgumentError, match="needs the field 'seed'"):
        RunSpec.from_dict({name: value for name, value in data.items() if name != "seed"})
    with pytest.raises(ArgumentError, match="adapter='Magic' is not allowed"):
        RunSpec.from_dict(data | {"adapter": {"adapter": "Magic"}})
    with pytest.raises(ArgumentError, match="epocs"):
        RunSpec.from_dict(data | {"protocol": {**data["protocol"], "epocs": 3}})


def test_grid_is_every_combination_once_with_seeds_fastest() -> None:
    specs = RunSpec.grid(
        task=["sst2", "rte", "SST-2"],
        adapter=[ht.Hadamard(), ht.HeadOnly()],
        protocol=Protocol(),
        seed=range(3),
    )
    assert [(s.task, type(s.adapter).__name__, s.seed) for s in specs] == [
        (task, adapter, seed)
        for task in ("sst2", "rte")
        for adapter in ("Hadamard", "HeadOnly")
        for seed in range(3)
    ]
    assert {s.backbone for s in specs} == {"minilm-l6"}
    with pytest.raises(ArgumentError, match=r"seed=\[\] is not allowed"):
        RunSpec.grid(task="sst2", adapter=ht.Hadamard(), protocol=Protocol(), seed=range(0))


def test_every_spelling_of_a_folder_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = (
        "models/mine",
        "./models/mine/",
        "models/../models/mine",
        "link",
        "~/models/mine",
        str(folder),
    )
    specs = [spec(backbone=name) for name in spellings]
    assert {one.backbone for one in specs} == {str(folder)}
    assert len(set(specs)) == len({one.key for one in specs}) == 1
    assert specs[0].as_given().backbone == "models/mine"
    assert RunSpec.from_dict(specs[0].to_dict()) == specs[0]
    for name in ("minilm-l6", "someone/model", "models/not-here/", "/nowhere/model/"):
        assert spec(backbone=name).backbone == name


def test_a_recorded_spelling_keeps_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = spec(backbone="mine").to_dict()  # there is no such folder yet, so this is a name
    (tmp_path / "mine").mkdir()
    assert RunSpec.from_dict(elsewhere).key == key_of(elsewhere) != spec(backbone="mine").key
    assert spec(backbone="mine").as_given() == RunSpec.from_dict(elsewhere)
    monkeypatch.chdir(tmp_path / "mine")
    (tmp_path / "mine" / "minilm-l6").mkdir()
    assert spec(backbone="minilm-l6").backbone == "minilm-l6"
