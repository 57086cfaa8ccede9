"""Every method beside every other: costs, the grid of scores with its gaps, few labels, one adapter per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

import hadamard_toolkit as ht
from hadamard_toolkit.studies import (
    FAMILIES,
    low_resource_table,
    method_scores,
    score_grid,
    score_table,
    sparse_methods,
)


def test_scores_come_with_what_a_method_trains(make_spec: Callable[..., ht.RunSpec], tmp_path: Path) -> None:
    store = ht.RunStore(tmp_path / "store")
    stack = ht.Stack(ht.IA3(), ht.LoRA())
    specs = [make_spec(adapter=adapter) for adapter in (ht.LoRA(), ht.Hadamard(), stack)]
    ht.sweep(specs, store)
    found = method_scores(store).set_index("method")
    assert list(found.index) == ["Hadamard", "LoRA"], "a stack is of no family"
    assert found["family"].to_dict() == {"Hadamard": "vectors", "LoRA": "low rank"}
    runs = store.load().drop_duplicates("key").set_index("method")
    assert found.loc["LoRA", "parameters"] == runs.loc["LoRA", "trained"]
    assert found.loc["LoRA", "stored"] == runs.loc["LoRA", "stored"]
    assert found["constant"].between(0.5, 1).all()
    assert found.loc["LoRA", "score"] == score_table(store).set_index("method").loc["LoRA", "score"]


def test_every_method_has_one_family() -> None:
    methods = [method for family in FAMILIES.values() for method in family]
    assert len(methods) == len(set(methods)) == 14
    assert all(hasattr(ht, method) for method in methods)


def test_the_grid_says_what_failed_what_was_not_run_and_what_nobody_planned() -> None:
    marked = pd.DataFrame(
        [
            ("sst2", "LoRA", 0.8, 0.509, False),
            ("sst2", "LoRA", 0.82, 0.509, False),
            ("sst2", "Hadamard", 0.77, 0.509, False),
            ("mrpc", "Hadamard", 0.81, 0.812, True),
            ("other", "Hadamard", 0.5, 0.5, True),
        ],
        columns=["task", "method", "score", "constant", "failed"],
    )
    plan = [
        ht.RunSpec("minilm-l6", task, adapter, ht.protocols.smoke())
        for task, adapter in (("sst2", ht.Hadamard()), ("mrpc", ht.LoRA()), ("rte", ht.Hadamard()))
    ]
    grid = score_grid(marked, plan)
    assert list(grid.columns) == ["sst2", "mrpc", "rte"]
    assert grid.index.tolist() == ["one answer for all", "Hadamard", "LoRA"]
    assert grid.loc["one answer for all"].tolist() == ["50.9", "81.2", "–"]
    assert grid.loc["Hadamard"].tolist() == ["77.0 (1)", "81.0 (1) †1", "not run"]
    assert grid.loc["LoRA"].tolist() == ["81.0 ± 1.4 (2)", "not run", "–"]


def test_few_labels_keep_the_order_of_the_methods_and_leave_out_random_heads(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store = ht.RunStore(tmp_path / "store")
    frozen = replace(make_spec().protocol, head="frozen-random")
    specs = [
        make_spec(adapter=ht.HeadOnly()),
        make_spec(adapter=ht.Hadamard()),
        make_spec(adapter=ht.Hadamard(), protocol=frozen),
        make_spec(adapter=ht.LoRA()),
    ]
    ht.sweep(specs, store)
    found = low_resource_table(store, specs, {ht.Hadamard(): "ours", ht.HeadOnly(): "the head"})
    assert found["method"].tolist() == ["ours", "the head"]
    assert found["rows"].tolist() == [48, 48]
    assert list(found.columns) == ["task", "method", "rows", "seed", "score", "n", "constant"]


def test_a_method_has_one_width_and_no_controls() -> None:
    rows = [
        ("Houlsby(bottleneck=32)", 0.4, "none"),
        ("Houlsby(bottleneck=64)", 0.4, "none"),
        ("Houlsby(bottleneck=32)", 0.5, "none"),
        ("Houlsby(bottleneck=32)", 0.4, "shuffled"),
        ("LoRA()", 0.4, "none"),
        ("MAM(bottleneck=16)", 0.4, "none"),
    ]
    table = pd.DataFrame(rows, columns=["adapter", "sparsity", "control"])
    found = sparse_methods(table, [0.0, 0.4], bottlenecks={"Houlsby": 32})
    assert found["adapter"].tolist() == ["Houlsby", "LoRA", "MAM"]
    assert found.index.tolist() == [0, 4, 5]
