"""Layer ablation as tables: what was planted in the scores of subsets is what the tables say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies import (
    better_than_chance,
    clearest_tests,
    constant_score,
    kept_and_removed,
    layer_scores,
    leave_one_out,
    of_runs,
    rank_correlation,
    removal_curves,
    removal_overview,
    removal_paths,
    removal_table,
    retrained_subsets,
    score_table,
    tasks_sharing_texts,
)
from tests.studies.removals import LAYERS, WORTH, planted, table


def test_runs_of_the_asked_depth_are_named_and_marked(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store = ht.RunStore(tmp_path / "store")
    specs = [make_spec(adapter=adapter) for adapter in (ht.Hadamard(), ht.Hadamard(vectors=("bias",)))]
    ht.sweep(specs, store)
    of_three = pd.DataFrame({"kept": ["0,1,2", ""], "split": "test", "score": [0.8, 0.5], "n": 40})
    taylor = pd.DataFrame({"layer": range(3), "taylor": [3.0, 1.0, 2.0], "fisher": [0.1, 0.2, 0.3]})
    for spec in specs:
        store.measured(spec.key, "removal", lambda: of_three)
        store.measured(spec.key, "taylor", lambda: taylor)
    removals = removal_table(store, layers=3)
    assert set(removals["key"]) == {specs[0].key}, "other adapters are other studies"
    assert removals[["kept", "score"]].values.tolist() == [["0,1,2", 0.8], ["", 0.5]]
    run = score_table(store).set_index("key").loc[specs[0].key]
    assert set(removals["metric"]) == {"accuracy"}
    assert set(removals["train_rows"]) == {run["train_rows"]}
    assert removals["failed"].nunique() == 1
    assert set(removals["constant"]) == {constant_score(store.run(specs[0].key))}
    curves = removal_curves(removals, pd.DataFrame({"key": specs[0].key, "kept": ["", "0,1,2"]}))
    assert curves["constant"].tolist() == removals["constant"].tolist()
    with pytest.raises(DataError, match="on 6 layers"):
        removal_table(store, layers=6)

    scores = layer_scores(store, removals)
    assert list(dict.fromkeys(scores["rule"])) == ["norm", "taylor", "fisher"]
    wide = scores.pivot(index="layer", columns="rule", values="value")
    assert wide["taylor"].tolist() == [3.0, 1.0, 2.0]
    vectors = store.vectors(specs[0].key)
    weight, bias = (vectors[f"attention_output.{name}"] for name in ("weight", "bias"))
    bias = bias - bias.mean(axis=1, keepdims=True)
    moved = np.sqrt(((weight - 1) ** 2).sum(axis=1) + (bias**2).sum(axis=1))
    np.testing.assert_allclose(wide["norm"], moved, rtol=1e-5)
    assert set(layer_scores(store, removals, rules=["fisher"])["rule"]) == {"fisher"}
    with pytest.raises(ArgumentError, match="rule='consensus'"):
        layer_scores(store, removals, rules=["consensus"])
    with pytest.raises(DataError, match="scores for every run"):
        layer_scores(store, pd.concat([removals, removals.assign(key="another")]), rules=["norm"])


def test_a_task_trained_on_several_numbers_of_rows_is_several_tasks(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store = ht.RunStore(tmp_path / "store")
    protocol = make_spec().protocol
    specs = [make_spec(protocol=replace(protocol, train_rows=rows)) for rows in (32, 48)]
    ht.sweep(specs, store)
    for spec in specs:
        scores = pd.DataFrame({"kept": ["0,1,2", ""], "split": "test", "score": [0.8, 0.5], "n": 40})
        store.measured(spec.key, "removal", lambda scores=scores: scores)
    assert sorted(set(removal_table(store, layers=3)["task"])) == ["sst2, K = 32", "sst2, K = 48"]


def test_the_overview_says_what_there_is_to_lose() -> None:
    removals = table(planted).assign(n=100, failed=False)
    removals.loc[removals["split"] == "validation", "n"] = 30
    removals.loc[removals["key"] == "1-0", "failed"] = True
    row = removal_overview(removals).loc["task 1"]
    assert row[["seeds", "failed", "held_out", "test"]].tolist() == [2, 1, 30, 100]
    assert row["worth"] == pytest.approx(WORTH.sum())
    assert row["all_layers"] == pytest.approx(0.6 + WORTH.sum() + 0.0005)
    assert row["no_layer"] == pytest.approx(0.6005)


def test_rows_of_some_runs_take_the_names_of_these_runs() -> None:
    long = pd.DataFrame({"key": ["a", "b", "a"], "task": "embedded/x", "value": [1, 2, 3]})
    runs = pd.DataFrame({"key": ["a", "a"], "task": ["x", "x"]})
    assert of_runs(long, runs).to_dict("list") == {"key": ["a", "a"], "task": ["x", "x"], "value": [1, 3]}


def test_a_score_in_the_order_of_the_drops_correlates_and_its_reverse_does_the_opposite() -> None:
    removals = table(planted, tasks=3)
    drops = leave_one_out(removals)
    keys = drops.drop_duplicates("key")[["key", "task"]]
    scores = pd.concat(
        keys.assign(layer=layer, rule=rule, value=sign * WORTH[layer])
        for layer in range(LAYERS)
        for rule, sign in (("same", 1), ("reverse", -1), ("constant", 0))
    )
    found = rank_correlation(scores, drops).set_index("rule")
    assert found["mean"].to_dict() == pytest.approx({"same": 1.0, "reverse": -1.0})
    assert found["n"].tolist() == [3, 3]


def test_the_clearest_test_of_each_question_is_told_beside_their_number() -> None:
    removals = table(planted, tasks=4)
    paths = removal_paths(removals)
    chance = better_than_chance(removals, paths)
    found = clearest_tests(chance).set_index("question")
    for question, row in found.iterrows():
        part = chance[chance["question"] == question]
        made = part[part["refused"] == ""]
        assert (row["tests"], row["refused"]) == (len(part), len(part) - len(made))
        assert row["significant"] == (made["p_holm"] <= 0.05).sum()
        if len(made):
            assert row["p_holm"] == made["p_holm"].min()
    hopeless = chance.assign(refused="could never be significant")
    assert clearest_tests(hopeless)[["significant"]].to_numpy().sum() == 0
    assert "rule" not in clearest_tests(hopeless)


def test_what_went_is_what_is_not_kept() -> None:
    removals = table(planted, tasks=1)
    curves = removal_curves(removals, removal_paths(removals))
    found = kept_and_removed(curves, size=2)
    assert found.index.tolist() == [("task 0", 0), ("task 0", 1)]
    assert found["removed"].tolist() == ["0, 2", "0, 2"], "the two layers that are worth least"
    assert found["score"].tolist() == pytest.approx(
        [0.6 + WORTH[[1, 3]].sum() + seed / 1000 for seed in (0, 1)]
    )
    assert found["full"].tolist() == pytest.approx([0.81, 0.811])
    assert found["none"].tolist() == pytest.approx([0.6, 0.601])
    with pytest.raises(ArgumentError, match="size=9"):
        kept_and_removed(curves, size=9)


def test_retraining_is_compared_with_the_same_subset_of_the_same_seed() -> None:
    removals = table(planted, tasks=1).assign(train_rows=300)
    base = {"key": "k", "task": "embedded/task 0", "train_rows": 300}
    whole = pd.DataFrame([{**base, "label": "Hadamard()", "seed": seed, "score": 0.8} for seed in (0, 1)])
    retrained = pd.DataFrame(
        [
            {**base, "label": "Hadamard(layers=(1, 3))", "seed": 0, "score": 0.79},
            {**base, "label": "Hadamard(layers=(1,))", "seed": 1, "score": 0.7},
            {**base, "label": "HeadOnly()", "seed": 1, "score": 0.1},
            {**base, "label": "Hadamard(layers=(1,))", "seed": 7, "score": 0.7},
        ]
    )
    found = retrained_subsets(retrained, whole, removals)
    assert found[["task", "seed", "kept"]].values.tolist() == [["task 0", 0, "1,3"], ["task 0", 1, "1"]]
    assert found["retrained"].tolist() == pytest.approx([-0.01, -0.1])
    assert found["after_the_fact"].tolist() == pytest.approx([-WORTH[[0, 2]].sum(), -WORTH[[0, 2, 3]].sum()])
    assert found["gap"].tolist() == pytest.approx([0.02, -0.01])
    other_rows = retrained_subsets(retrained, whole, removals.assign(train_rows=500))
    assert other_rows.empty


def test_sst2_and_the_movies_share_texts() -> None:
    tasks = ["sst2", "movies-polarity", "tweets-polarity", "embedded/movies-intensity", "my-movies"]
    assert tasks_sharing_texts(tasks) == [{"sst2", "movies-polarity", "embedded/movies-intensity"}]
