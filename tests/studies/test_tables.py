"""Tables from a store say what the runs in it say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import adapter_to_dict
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.spec import canonical_json
from hadamard_toolkit.studies import (
    constant_score,
    history_table,
    learned,
    mark_failed,
    measured_table,
    named_scores,
    normalised_scores,
    rates_tried,
    score_table,
    sparse_table,
    vector_table,
)


@pytest.fixture
def store(make_spec: Callable[..., ht.RunSpec], tmp_path: Path) -> ht.RunStore:
    store = ht.RunStore(tmp_path / "store")
    adapters = (ht.HeadOnly(), ht.Hadamard(layers=(0, 2)))
    ht.sweep([make_spec(adapter=adapter, seed=seed) for adapter in adapters for seed in (0, 1)], store)
    return store


def test_tables_of_a_store(store: ht.RunStore) -> None:
    scores = score_table(store)
    assert list(scores.columns) == [
        "key", "task", "method", "label", "seed", "metric", "score", "n", "train_rows", "subset",
    ]  # fmt: skip
    assert scores.index.tolist() == list(range(4))
    assert scores[["method", "seed"]].values.tolist() == [
        ["Hadamard", 0],
        ["Hadamard", 1],
        ["HeadOnly", 0],
        ["HeadOnly", 1],
    ]
    for row in scores.itertuples():
        assert row.score == store.run(str(row.key)).metrics["test"]["accuracy"]
        assert (row.metric, row.n, row.train_rows) == ("accuracy", 40, 48)

    for row in score_table(store, split="validation").itertuples():
        assert row.score == store.run(str(row.key)).metrics["validation"]["accuracy"]
        assert row.n != 40

    history = history_table(store)
    one = history[(history["method"] == "Hadamard") & (history["seed"] == 1)]
    run = store.run(str(one["key"].iloc[0]))
    trained = one[one["split"] == "train"]
    assert trained["value"].tolist() == run.history["loss"].tolist()
    assert list(zip(trained["stage"], trained["epoch"], strict=True)) == [(1, 1), (1, 2), (2, 1)]
    held_out = one[one["split"] == "validation"]
    assert held_out["value"].tolist() == run.history["eval_accuracy"].tolist()

    vectors = vector_table(store)
    assert set(vectors["layer"]) == {0, 2}, "layers without an adapter have no rows"
    assert len(vectors) == 2 * 2 * 2 * 16  # seeds, layers, vectors, coordinates
    weight = vectors[(vectors["seed"] == 1) & (vectors["layer"] == 2) & (vectors["vector"] == "weight")]
    np.testing.assert_array_equal(weight["value"], run.vectors()["attention_output.weight"][2])
    assert weight["coordinate"].tolist() == list(range(16))
    assert list(vectors.columns) == ["key", "task", "seed", "layer", "vector", "coordinate", "value"]
    assert vectors.index.tolist() == list(range(len(vectors)))
    order = ["task", "seed", "layer", "vector", "coordinate"]
    assert vectors[order].equals(vectors[order].sort_values(order, ignore_index=True))
    with pytest.raises(DataError, match="site='key'"):
        vector_table(store, site="key")


def test_runs_stored_without_weights_have_no_vectors(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    bare, kept = make_spec(adapter=ht.Hadamard(), seed=0), make_spec(adapter=ht.Hadamard(), seed=1)
    ht.sweep([bare], ht.RunStore(tmp_path / "store", keep="nothing"))
    store = ht.RunStore(tmp_path / "store", keep="vectors")
    with pytest.raises(DataError, match=r"no run of .* has vectors"):
        vector_table(store)
    ht.sweep([kept], store)
    assert set(vector_table(store)["key"]) == {kept.key}


def test_a_constant_answer_scores_what_naming_the_commonest_label_would(store: ht.RunStore) -> None:
    run = store.run(store.keys()[0])
    labels = run.predictions["test"]["labels"]
    assert constant_score(run) == max(np.mean(labels == 0), np.mean(labels == 1))
    assert constant_score(run) >= 0.5

    test = {"labels": np.array([0, 1, 1, 2]), "logits": np.zeros((4, 3), np.float32)}
    of_three = replace(run, predictions={"test": test}, headline="macro-f1")
    assert constant_score(of_three) == pytest.approx(
        2 / 3 / 3
    )  # precision 1/2 and recall 1 of one class in three
    regression = {"labels": np.array([0.5, 2.0], np.float32), "logits": np.ones((2, 1), np.float32)}
    assert constant_score(replace(run, predictions={"test": regression}, headline="spearman")) == 0
    spans = {"labels": np.zeros((2, 2)), "f1": np.zeros(2)}
    assert np.isnan(constant_score(replace(run, predictions={"test": spans}, headline="f1")))


def test_runs_at_the_level_of_one_answer_are_marked(store: ht.RunStore) -> None:
    scores = score_table(store)
    constant = constant_score(store.run(scores["key"].iloc[0]))
    scores["score"] = [constant, constant - 0.2, constant + 0.009, constant + 0.3]
    marked = mark_failed(scores, store)
    assert marked["constant"].tolist() == [constant] * 4
    assert marked["failed"].tolist() == [True, True, True, False]
    assert mark_failed(scores, store, margin=0.0)["failed"].tolist() == [True, True, False, False]


def test_normalised_scores_stand_between_the_constant_answer_and_full_fine_tuning() -> None:
    marked = pd.DataFrame(
        [
            ("x", "FullFineTuning", 0.7, 0.5, False),
            ("x", "FullFineTuning", 0.9, 0.5, False),
            ("x", "Hadamard", 0.65, 0.5, False),
            ("ranks", "FullFineTuning", 0.8, 0.0, False),
            ("ranks", "Hadamard", 0.6, 0.0, False),
            ("no", "FullFineTuning", 0.5, 0.5, True),
            ("no", "Hadamard", 0.52, 0.5, False),
        ],
        columns=["task", "method", "score", "constant", "failed"],
    )
    found = normalised_scores(marked).set_index(["method", "task"])["normalised"]
    assert found["Hadamard"].to_dict() == pytest.approx({"x": 0.5, "ranks": 0.75}), "no scale for the third"
    with pytest.raises(ArgumentError, match="ceiling='BitFit'"):
        normalised_scores(marked, "BitFit")


def test_tasks_that_no_trained_layer_learns_are_left_out() -> None:
    rows = [
        *[("easy", "Hadamard", False), ("easy", "HeadOnly", True), ("easy", "HeadOnly", True)],
        *[("half", "Hadamard", True), ("half", "LoRA", False)],
        *[("hard", "Hadamard", True), ("hard", "Hadamard", True), ("hard", "LoRA", False)],
        *[("hard", "HeadOnly", False), ("head", "HeadOnly", False)],
    ]
    marked = pd.DataFrame(rows, columns=["task", "method", "failed"])
    assert list(learned(marked).index) == [0, 1, 2, 3, 4], "two of three runs on `hard` have failed"
    assert set(learned(marked, control="Hadamard")["task"]) == {"half", "hard", "head"}


def test_an_empty_store_gives_empty_tables(tmp_path: Path) -> None:
    empty = ht.RunStore(tmp_path)
    assert score_table(empty).empty
    assert history_table(empty).columns.tolist()[-2:] == ["metric", "value"]


def test_sparse_table_tells_masks_controls_and_the_small_dense_adapter_apart(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store, wide = ht.RunStore(tmp_path / "sparse", keep="vectors"), ht.Pfeiffer(bottleneck=8, init="normal")
    pruned = ht.Sparsity("random", 0.5)
    specs = [
        make_spec(adapter=wide),
        make_spec(adapter=wide, sparsity=pruned),
        make_spec(adapter=wide, sparsity=ht.Sparsity("random", 0.5, control="shuffled")),
        make_spec(adapter=ht.Pfeiffer(bottleneck=4, init="normal")),
        make_spec(adapter=ht.HeadOnly()),
    ]
    ht.sweep(specs, store)
    table = sparse_table(store).set_index("key")
    assert list(table.columns[:6]) == ["adapter", "task", "scorer", "sparsity", "control", "seed"]
    assert specs[4].key not in table.index, "never pruned"
    assert set(table["adapter"]) == {'Pfeiffer(bottleneck=8, init="normal")'}
    found = {spec.key: tuple(table.loc[spec.key, ["scorer", "sparsity", "control"]]) for spec in specs[:3]}
    assert list(found.values()) == [
        ("dense", 0.0, "none"),
        ("random", 0.5, "none"),
        ("random", 0.5, "shuffled"),
    ]
    held_out = sparse_table(store, split="validation").set_index("key")
    for key in table.index:
        assert held_out.loc[key, "score"] == store.run(key).metrics["validation"]["accuracy"]
        assert table.loc[key, "score"] == store.run(key).metrics["test"]["accuracy"]
    small = table.loc[specs[3].key]
    assert (small["scorer"], small["control"]) == ("dense", "dense")
    assert small["sparsity"] == pytest.approx(1 - small["nonzero"] / table.loc[specs[0].key, "nonzero"])
    assert table.loc[specs[1].key, "nonzero"] < table.loc[specs[0].key, "nonzero"]
    alone = store.only([specs[1], specs[3]])
    assert list(sparse_table(alone)["key"]) == [specs[1].key], "no whole adapter to measure the small one by"


def test_what_was_measured_comes_back_beside_its_run(store: ht.RunStore) -> None:
    with pytest.raises(DataError, match="'width' was not measured"):
        measured_table(store, "width")
    first = score_table(store)["key"].iloc[0]
    store.measured(first, "width", lambda: pd.DataFrame({"seed": [9], "width": [16.5]}))
    table = measured_table(store, "width")
    assert table.columns.tolist() == ["key", "task", "method", "seed", "width"]
    assert table.values.tolist() == [[first, "sst2", "Hadamard", 0, 16.5]]


NAMED = {"head": ht.HeadOnly(), "small": ht.LoRA(rank=2)}


def run_rows(**columns: list[object]) -> pd.DataFrame:
    rows = {"headline": True, "split": "test", "task": "sst2", "seed": 0, "n": 8, "train_rows": 16}
    return pd.DataFrame(columns).assign(**{name: v for name, v in rows.items() if name not in columns})


class Loaded:
    """A store that loads this table."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.load = lambda: table


def test_rates_tried_their_best_and_their_edges() -> None:
    rates = [0.1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    runs = run_rows(
        method=["LoRA"] * 4 + ["IA3"] * 3,
        split=["validation"] * 7,
        protocol=[f'{{"learning_rate": {rate}}}' for rate in rates],
        value=[0.5, 0.7, 0.8, 0.4, 0.1, 0.2, 0.3],
    )
    table = rates_tried(Loaded(runs))  # type: ignore[arg-type]
    assert table.query("method == 'LoRA'")["score"].tolist() == pytest.approx([0.6, 0.8, 0.4])
    assert table["rate"].tolist() == [0.1, 0.2, 0.3] * 2
    assert table.query("best")[["method", "rate", "edge"]].values.tolist() == [
        ["IA3", 0.3, True],
        ["LoRA", 0.2, False],
    ]
    assert table["edge"].tolist() == [True, False, True] * 2


def test_runs_of_named_adapters_in_their_order() -> None:
    text = {name: canonical_json(adapter_to_dict(adapter)) for name, adapter in NAMED.items()}
    runs = run_rows(
        adapter=[text["small"], text["head"], text["small"], text["small"], '{"adapter": "BitFit"}'],
        key=list("abcde"),
        train_rows=[500, 100, 100, 100, 100],
        seed=[0, 0, 1, 0, 0],
        value=[0.1, 0.2, 0.3, 0.4, 0.5],
        metric=["accuracy"] * 5,
        head_policy=["trained"] * 5,
        pretraining=[""] * 5,
    )
    table = named_scores(Loaded(runs), NAMED)  # type: ignore[arg-type]
    assert table["key"].tolist() == ["b", "d", "c", "a"]
    assert table["method"].tolist() == ["head", "small", "small", "small"]
    columns = ["key", "task", "method", "seed", "metric", "score", "n", "rows", "head", "pretraining"]
    assert list(table.columns) == columns
    assert table["rows"].tolist() == [100, 100, 100, 500]
