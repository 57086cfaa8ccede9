"""Gates are measured on the trained model, whether the store has its weights or it must be trained again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.measurements import MEASUREMENTS, measure
from hadamard_toolkit.measurements.gates import gates

MakeSpec = Callable[..., ht.RunSpec]


def test_gates_of_a_run_come_out_the_same_with_and_without_its_weights(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(adapter=ht.UniPELT(), protocol=replace(make_spec().protocol, head="trained"))
    tables = {}
    for keep in ("adapters", "vectors"):
        store = ht.RunStore(tmp_path / keep, keep=keep)
        tables[keep] = measure("gates", ht.run(spec, store), store)
    found = tables["adapters"]
    assert len(found) == 3 * 4, "four gates in each of three layers"
    assert (found["n"] == 40).all(), "all test rows, since there are fewer than 64"
    assert found["mean"].between(0, 1).all()
    assert (found["sd"] > 0).any()
    pd.testing.assert_frame_equal(found, tables["vectors"])


def test_gates_are_measured_with_padding_on_the_right(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(
        adapter=ht.UniPELT(gated="masked"), protocol=replace(make_spec().protocol, head="trained")
    )
    store = ht.RunStore(tmp_path)
    ht.run(spec, store)
    settings = Path(spec.backbone) / "tokenizer_config.json"
    before, text = gates(store.run(spec.key), store), settings.read_text()
    try:
        settings.write_text(json.dumps({**json.loads(text), "padding_side": "left"}))
        pd.testing.assert_frame_equal(gates(store.run(spec.key), store), before)
    finally:
        settings.write_text(text)


def test_what_does_not_apply_is_refused_and_the_command_goes_on(
    make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ht.RunStore(tmp_path / "store")
    specs = [make_spec(seed=seed) for seed in (0, 1)]
    ht.sweep(specs, store)
    with pytest.raises(ArgumentError, match=r"\(Hadamard\) has no gates"):
        measure("gates", store.run(specs[0].key), store)
    with pytest.raises(ArgumentError, match=r"name='gate'.*gates"):
        measure("gate", store.run(specs[0].key), store)
    assert main(["measure", "gates", "--seed", "1", "--store", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(specs[1].key)
    assert "left out" in said
    assert specs[0].key not in said
    assert main(["measure", "gates", "--seed", "2", "--store", str(tmp_path / "store")]) == 1, "no such run"


def test_every_measurement_is_where_the_registry_says() -> None:
    import importlib

    for name, module in MEASUREMENTS.items():
        assert callable(getattr(importlib.import_module(f"hadamard_toolkit.measurements.{module}"), name))
