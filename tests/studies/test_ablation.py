"""The grid of parts: read from adapters, differences paired by run, planted effects found."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import adapter_to_dict
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies.ablation import (
    CELLS,
    ablation_table,
    cell_name,
    cell_of,
    component_effects,
    effects_text,
)
from hadamard_toolkit.studies.text import interval_text

GRID = {
    ht.HeadOnly(): "nothing",
    ht.LayerNormTuning(): "norm",
    ht.Hadamard(): "W + b + norm",
    ht.Hadamard(norm=None): "W + b",
    ht.Hadamard(vectors=("weight",)): "W + norm",
    ht.Hadamard(vectors=("bias",)): "b + norm",
    ht.Hadamard(vectors=("weight",), norm=None): "W",
    ht.Hadamard(vectors=("bias",), norm=None): "b",
}


def runs(effects: dict[str, float], *, noise: float = 0.0, seeds: int = 3, seed: int = 0) -> pd.DataFrame:
    """A store's table with planted effects of the parts."""
    generator = np.random.default_rng(seed)
    rows = []
    for task in ("s", "t"):
        for run in range(seeds):
            for adapter, cell in GRID.items():
                score = (
                    0.6
                    + sum(effects.get(part, 0.0) for part in cell.split(" + "))
                    + generator.normal() * noise
                )
                rows.append((f"{task}{run}{cell}", task, run, json.dumps(adapter_to_dict(adapter)), score))
    table = pd.DataFrame(rows, columns=["key", "task", "seed", "adapter", "value"])
    return table.assign(headline=True, split="test", sparsity="null", protocol="p", trained=1, n=400)


def test_the_cells_are_read_from_the_adapters() -> None:
    assert {cell_name(*cell) for cell in CELLS} == set(GRID.values())
    for adapter, name in GRID.items():
        cell = cell_of(json.dumps(adapter_to_dict(adapter)))
        assert cell_name(*(cell or ())) == name
    outside = (
        ht.Hadamard(layers=(0,)),
        ht.Hadamard(placement="attention_heads"),
        ht.Hadamard(norm="both"),
        ht.LayerNormTuning(norm="output"),
        ht.LoRA(),
    )
    assert [cell_of(json.dumps(adapter_to_dict(adapter))) for adapter in outside] == [None] * 5


def test_planted_effects_come_back() -> None:
    planted = {"W": 0.01, "b": 0.05, "norm": 0.03}
    table = ablation_table(runs(planted))
    assert table["cell"].unique().tolist() == [cell_name(*cell) for cell in CELLS]
    assert table.loc[table["cell"] == "W + b + norm", "gain"].to_numpy() == pytest.approx(0.09)
    effects = component_effects(table)
    assert len(effects) == 3 * 5 + 1
    for part, size in {**planted, "W + b": 0.06}.items():
        assert effects.loc[effects["part"] == part, "effect"].to_numpy() == pytest.approx(size)
    whole = effects[(effects["part"] == "W") & (effects["beside"] == "b + norm")].iloc[0]
    assert (whole["tasks"], whole["runs"]) == (2, 6)


def test_the_facts_of_a_run_come_with_it() -> None:
    told = runs({"W": 0.01}).assign(trained=range(48), n=range(100, 148))
    table = ablation_table(told).set_index("key")
    for row in told.itertuples():
        found = table.loc[row.key]
        assert (found["parameters"], found["n"], found["task"], found["seed"]) == (
            row.trained,
            row.n,
            row.task,
            row.seed,
        )
        assert found["score"] == row.value
    other = told.assign(split="validation")
    assert ablation_table(other).empty
    assert ablation_table(told.assign(headline=False)).empty
    assert ablation_table(told.assign(sparsity='{"scorer": "snip"}')).empty


def test_in_noise_the_interval_holds_zero_as_often_as_it_says() -> None:
    held = []
    for seed in range(60):
        effects = component_effects(ablation_table(runs({}, noise=0.01, seed=seed)))
        main = effects[(effects["beside"] == "average") | (effects["part"] == "W + b")]
        held += ((main["low"] <= 0) & (main["high"] >= 0)).tolist()
    assert 0.90 < np.mean(held) < 0.99


def test_over_tasks_the_task_means_are_the_sample() -> None:
    table = ablation_table(runs({"W": 0.01}, noise=0.01))
    by_task = table.pivot(index=["task", "seed"], columns="cell", values="score")
    gains = (by_task["W"] - by_task["nothing"]).groupby("task").mean()
    effects = component_effects(table, over="task").set_index(["part", "beside"])
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    row = effects.loc[("W", "nothing")]
    assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])
    seeds = component_effects(table).set_index(["part", "beside"])
    assert row["effect"] == seeds.loc[("W", "nothing"), "effect"]
    assert set(effects["over"]) == {"task"}
    assert set(seeds["over"]) == {"seed"}
    with pytest.raises(ArgumentError, match="over='rows' is not allowed"):
        component_effects(table, over="rows")


def test_missing_cells_leave_their_comparisons_out() -> None:
    whole = ablation_table(runs({"W": 0.01}))
    part = component_effects(whole[whole["cell"] != "W"])
    assert part[part["beside"] == "average"]["effect"].isna().all() or "average" not in set(part["beside"])
    assert not ((part["part"] == "W") & (part["beside"] == "nothing")).any()
    assert ((part["part"] == "W") & (part["beside"] == "b")).any()
    control = component_effects(whole[whole["cell"] != "norm"])
    assert "W + b" in set(part["part"])
    assert "W + b" not in set(control["part"])
    assert ablation_table(runs({}).iloc[:0]).empty


def test_mixed_protocols_are_refused() -> None:
    one = runs({})
    with pytest.raises(ArgumentError, match="one plan"):
        ablation_table(pd.concat([one, one.assign(protocol="q")]))
    with pytest.raises(ArgumentError, match="one plan"):
        ablation_table(pd.concat([one, one]))


def test_effects_in_words_hold_both_intervals() -> None:
    grid = ablation_table(runs({"W": 0.01, "b": 0.03}, noise=0.004))
    shown = effects_text(grid)
    by_seed, by_task = (component_effects(grid, over=over) for over in ("seed", "task"))
    assert list(shown.columns) == ["tasks", "runs", "other seeds", "other tasks"]
    row, other = by_seed.iloc[0], by_task.iloc[0]
    told = shown.loc[(row["part"], row["beside"])]
    assert (told["tasks"], told["runs"]) == (row["tasks"], row["runs"])
    assert told["other seeds"] == interval_text(row["effect"], row["low"], row["high"], times=100)
    assert told["other tasks"] == interval_text(other["effect"], other["low"], other["high"], times=100)
    assert told["other seeds"] != told["other tasks"]
