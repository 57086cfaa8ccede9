"""Gates are recorded as batches pass, and measured on a trained model, whether its weights were kept or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.measurements import MEASUREMENTS, measure
from hadamard_toolkit.measurements.gates import gates
from tests.adapters.life import logits, shake
from tests.architectures import tiny_batch, tiny_model

MakeSpec = Callable[..., ht.RunSpec]


def test_the_record_holds_what_the_formula_says() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(
        model, ht.Stack(ht.LoRA(rank=2, gated="original"), ht.Pfeiffer(bottleneck=4, gated="original"))
    )
    shake(attachment)
    before = logits(model)
    read: list[Tensor] = []
    handle = attachment.sites(1, "value").module.register_forward_pre_hook(
        lambda m, args: read.append(args[0])
    )
    with ht.record_gates(attachment) as record, torch.no_grad():
        for seed in (0, 1):
            model(**tiny_batch(seed=seed))
    handle.remove()
    table = record.table()
    assert list(table.columns) == ["layer", "gate", "example", "value"]
    assert len(table) == 3 * 3 * 6, "three layers, three gates, two batches of three"
    assert sorted(set(table["gate"])) == ["ffn_residual", "query", "value"]
    gates = attachment.named_parameters("gate")
    weight, bias = (gates[f"gate.layers.1.value.gate.{name}"] for name in ("weight", "bias"))
    expected = torch.sigmoid(torch.cat(read) @ weight + bias).mean(1)
    mine = table[(table.layer == 1) & (table.gate == "value")].sort_values("example")
    torch.testing.assert_close(torch.tensor(mine["value"].to_numpy()).float(), expected.detach())
    assert torch.equal(logits(model), before), "recording changes nothing"
    assert len(record.table()) == len(table), "and ends with its block"


def test_an_adapter_without_gates_has_none_to_record() -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LoRA())
    with pytest.raises(UnsupportedError, match="no gates to record"), ht.record_gates(attachment):
        pass


def test_gates_are_recorded_by_layer_and_module() -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, ht.UniPELT(bottleneck=4, length=2, rank=2))
    with ht.record_gates(attachment) as record:
        logits(model)
    table = record.table()
    assert len(table) == 3 * 4 * 3, "layers, gates, examples"
    assert set(table["gate"]) == {"prefix", "query", "value", "ffn_residual"}
    assert table["value"].between(0.35, 0.65).all(), "near one half at the start"


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
