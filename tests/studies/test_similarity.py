"""Similarity finds what was planted between floor and ceiling, and nothing in noise."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies.kinship import cluster_tasks
from hadamard_toolkit.studies.similarity import (
    ALL_LAYERS,
    share_text,
    similarity_contrast,
    similarity_matrix,
    similarity_summary,
    vector_similarity,
)
from tests.training.tiny import tiny_bert

WIDTH, LAYERS, SEEDS = 384, 4, 3
SHARED, RELIABILITY = 0.6, 0.5
PLANTED = ("alike a", "alike b", "alone", "noise")


def table(runs: dict[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    """Changes [layers, vectors, coordinates] of each (task, seed) as `vector_table` gives them: W is 1 + its change."""
    parts = []
    for (task, seed), changes in runs.items():
        for place, vector in enumerate(("weight", "bias")):
            values = changes[:, place] + (vector == "weight")
            layer, coordinate = (axis.ravel() for axis in np.indices(values.shape))
            columns = {"layer": layer, "coordinate": coordinate, "value": values.ravel()}
            parts.append(
                pd.DataFrame(columns).assign(key=f"{task} {seed}", task=task, seed=seed, vector=vector)
            )
    return pd.concat(parts, ignore_index=True)


def planted(seed: int = 0) -> pd.DataFrame:
    """Two tasks whose directions have a cosine of SHARED, one alone, one of noise; runs of known reliability."""
    generator = np.random.default_rng(seed)
    shape = (LAYERS, 2, WIDTH)

    def direction(*against: np.ndarray) -> np.ndarray:
        found = generator.normal(size=shape)
        found -= found.mean(-1, keepdims=True)
        for other in against:
            found -= (found * other).sum(-1, keepdims=True) * other
        return found / np.linalg.norm(found, axis=-1, keepdims=True)

    first = direction()
    own = direction(first)
    alone = direction(first, own)
    truth = {
        "alike a": first,
        "alike b": SHARED * first + np.sqrt(1 - SHARED**2) * own,
        "alone": alone,
        "noise": np.zeros(shape),
    }
    error = np.sqrt((1 / RELIABILITY - 1) / WIDTH)
    runs = {
        (task, s): 0.02 * (truth[task] + error * generator.normal(size=shape))
        for task, s in itertools.product(PLANTED, range(SEEDS))
    }
    return table(runs)


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    return similarity_summary(vector_similarity(planted()))


@pytest.mark.parametrize("vector", ["weight", "bias"])
@pytest.mark.parametrize("measure", ["cosine", "spearman"])
@pytest.mark.parametrize("removed", [0, 4])
def test_a_planted_direction_is_recovered_once_noise_is_taken_out(
    summary: pd.DataFrame, vector: str, measure: str, removed: int
) -> None:
    choice = {"vector": vector, "measure": measure, "removed": removed}
    raw = similarity_matrix(summary, **choice).to_dict()  # type: ignore[arg-type]
    assert raw["alike a"]["alike a"] == pytest.approx(RELIABILITY, abs=0.06)
    assert raw["alike a"]["alike b"] == pytest.approx(SHARED * RELIABILITY, abs=0.06)
    assert abs(raw["alike a"]["alone"]) < 0.06
    table = similarity_matrix(summary, **choice, value="disattenuated")  # type: ignore[arg-type]
    freed = table.to_dict()
    assert freed["alike a"]["alike b"] == pytest.approx(SHARED, abs=0.08)
    assert abs(freed["alike b"]["alone"]) < 0.1
    assert freed["alike a"]["alike a"] == pytest.approx(1)
    assert table["noise"].isna().all(), "noise has no reliability to correct for"


def test_pairs_of_one_seed_do_not_count(summary: pd.DataFrame) -> None:
    pairs = vector_similarity(planted(), permutations=19)
    assert list(pairs.columns) == [
        *("task_a", "task_b", "seed_a", "seed_b", "key_a", "key_b", "layer", "vector", "measure", "removed"),
        *("value", "floor", "floor_high", "random_sd"),
    ]
    assert len(pairs[pairs["layer"] == ALL_LAYERS].query("task_a != task_b and seed_a == seed_b")) > 0
    sabotaged = pairs.assign(value=pairs["value"].where(pairs["seed_a"] != pairs["seed_b"], 1.0))
    pd.testing.assert_frame_equal(similarity_summary(pairs), similarity_summary(sabotaged))
    between = summary["task_a"] != summary["task_b"]
    assert set(summary.loc[between, "pairs"]) == {SEEDS * (SEEDS - 1)}
    assert set(summary.loc[~between, "pairs"]) == {SEEDS * (SEEDS - 1) // 2}
    assert (summary["low"] <= summary["value"]).all()
    assert (summary["value"] <= summary["high"]).all()
    assert (summary["least"] <= summary["value"] + 1e-12).all()
    assert (summary["value"] <= summary["most"] + 1e-12).all()
    with pytest.raises(ArgumentError, match="different seeds"):
        similarity_summary(pairs[pairs["seed_a"] == pairs["seed_b"]])


def pairs_by_hand(**values: list[float]) -> pd.DataFrame:
    """One cell of three seeds: `a` and `b` within a task, seeds (0, 1), (0, 2), (1, 2); `ab` between them."""
    seeds = list(itertools.combinations(range(3), 2))
    both = [*seeds, *((b, a) for a, b in seeds)]
    rows = [
        (name[0], name[-1], *seed, value)
        for name, own in values.items()
        for seed, value in zip(seeds if len(name) == 1 else both, own, strict=True)
    ]
    found = pd.DataFrame(rows, columns=["task_a", "task_b", "seed_a", "seed_b", "value"])
    cell = {"layer": ALL_LAYERS, "vector": "bias", "measure": "cosine", "removed": 0}
    return found.assign(**cell, floor=0.01 * found["value"], floor_high=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_of_pairs_count_their_seeds(level: float) -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.2, 0.35, 0.6], "ab": [0.1, 0.2, 0.25, 0.3, 0.3, 0.35]}
    table = similarity_summary(pairs_by_hand(**values), level=level)
    found = table.set_index(["task_a", "task_b"])
    for place, own in zip((("a", "a"), ("b", "b"), ("a", "b")), values.values(), strict=True):
        row = found.loc[place]
        half = stats.t.ppf(1 - (1 - level) / 2, 3 - 1) * np.std(own, ddof=1) / np.sqrt(3)
        if place[0] == place[1]:  # three pairs of three runs, each run in two of them
            half *= np.sqrt(2 * (3 + 1) / (3 - 1))
        assert row["value"] == pytest.approx(np.mean(own))
        assert [row["low"], row["high"]] == pytest.approx(
            [max(np.mean(own) - half, -1), min(np.mean(own) + half, 1)]
        )
        assert (row["least"], row["most"], row["pairs"]) == (min(own), max(own), len(own))
        assert (row["floor"], row["floor_high"]) == pytest.approx((0.01 * np.mean(own), 0.1))
    ceiling = np.sqrt(np.mean(values["a"]) * np.mean(values["b"]))
    assert found.loc[("a", "b"), "ceiling"] == pytest.approx(ceiling)
    assert found.loc[("a", "b"), "disattenuated"] == pytest.approx(np.mean(values["ab"]) / ceiling)


def test_directions_drawn_evenly_spread_by_the_root_of_their_coordinates() -> None:
    pairs = vector_similarity(planted(), outliers=4, permutations=19)
    spread = pairs.groupby(["layer", "removed"])["random_sd"].agg(["min", "max"])
    for (layer, removed), own in spread.iterrows():  # type: ignore[misc]
        width = (LAYERS if layer == ALL_LAYERS else 1) * (WIDTH - removed)
        assert own.tolist() == pytest.approx([1 / np.sqrt(width)] * 2)


def test_tasks_are_as_alike_as_the_average_pair_says(summary: pd.DataFrame) -> None:
    found = similarity_contrast(summary)
    cell = found.query("layer == @ALL_LAYERS and vector == 'weight' and measure == 'cosine' and removed == 0")
    rows = cell.set_index("quantity")
    value = rows["value"].to_dict()
    # one pair of six shares SHARED x RELIABILITY; three tasks of four have RELIABILITY
    assert value["between"] == pytest.approx(SHARED * RELIABILITY / 6, abs=0.02)
    assert value["within"] == pytest.approx(RELIABILITY * 3 / 4, abs=0.03)
    assert value["gap"] == pytest.approx(value["within"] - value["between"])
    assert abs(value["floor"]) < 0.01
    assert value["disattenuated"] == pytest.approx(SHARED / 3, abs=0.05)
    assert rows.loc[["between", "within", "disattenuated"], "pairs"].tolist() == [6, 4, 3]
    assert (rows["low"] <= rows["value"]).all()
    assert (rows["value"] <= rows["high"]).all()


def test_noise_is_above_its_floor_as_often_as_the_level_says() -> None:
    generator = np.random.default_rng(3)
    runs = {
        # heavy tails and a common sign: what a null that drew Gaussian directions would call alike
        (f"task {place // 2}", place % 2): 0.1 * (generator.standard_t(2.5, size=(6, 2, 96)) + 0.7)
        for place in range(14)
    }
    pairs = vector_similarity(table(runs))
    raw = pairs[(pairs["layer"] != ALL_LAYERS) & (pairs["removed"] == 0)]
    rates = (raw["value"] > raw["floor_high"]).groupby([raw["vector"], raw["measure"]]).mean()
    assert len(raw) == 91 * 6 * 4
    assert rates.between(0.025, 0.08).all(), rates
    cosine = raw.query("vector == 'weight' and measure == 'cosine'")
    assert cosine["floor"].mean() > 0.05 > abs(raw.query("vector == 'bias'")["floor"].mean())
    assert (cosine["value"] > 1.645 * cosine["random_sd"]).mean() > 0.2


def test_outliers_that_all_runs_share_are_seen_and_taken_out() -> None:
    generator = np.random.default_rng(4)
    changes = {
        (task, seed): 0.1 * generator.normal(size=(2, 2, 128)) for task in ("a", "b") for seed in (0, 1)
    }
    for change in changes.values():
        change[..., 5], change[..., 77] = 3.0, -2.0
    pairs = vector_similarity(table(changes), outliers=2, permutations=19)
    mean = pairs[pairs["layer"] >= 0].groupby(["measure", "removed"])["value"].mean()
    assert mean["cosine", 0] > 0.8
    assert abs(mean["cosine", 2]) < 0.1
    assert abs(mean["spearman", 0]) < 0.15


def test_a_constant_added_to_b_is_nothing_where_a_layer_norm_follows() -> None:
    inputs = {"input_ids": torch.randint(3, 20, (4, 9), generator=torch.Generator().manual_seed(0))}
    moved = {}
    for placement in ("attention_output", "attention_heads"):
        attachment = ht.attach(tiny_bert().eval(), ht.Hadamard(placement=placement))
        with torch.no_grad():
            before = attachment.model(**inputs).logits
            for name, value in attachment.named_parameters("adapter").items():
                if name.endswith("bias"):
                    value.add_(0.7)
            moved[placement] = float((attachment.model(**inputs).logits - before).abs().max())
    assert moved["attention_output"] < 1e-5 < 1e-2 < moved["attention_heads"]

    generator = np.random.default_rng(5)
    changes = {(task, 0): generator.normal(size=(1, 2, 64)) for task in ("a", "b")}
    shifted = {place: change + 3.0 for place, change in changes.items()}
    plain, other = (vector_similarity(table(runs), permutations=19) for runs in (changes, shifted))
    bias = plain["vector"] == "bias"
    np.testing.assert_allclose(plain.loc[bias, "value"], other.loc[bias, "value"], atol=1e-12)
    kept = vector_similarity(table(shifted), permutations=19, null_direction=None)
    cosine = kept.query("vector == 'bias' and measure == 'cosine' and removed == 0")["value"]
    assert (cosine > 0.8).all()


def test_tasks_that_share_texts_are_never_paired() -> None:
    assert share_text("sst2", "embedded/movies-polarity")
    assert share_text("embedded/movies-intensity", "sst2")
    assert not share_text("sst2", "embedded/tweets-polarity")
    changes = {
        (task, seed): np.random.default_rng(seed).normal(size=(1, 2, 16))
        for task in ("sst2", "embedded/movies-polarity", "cola")
        for seed in (0, 1)
    }
    pairs = vector_similarity(table(changes), outliers=0, permutations=19)
    assert {frozenset(pair) for pair in zip(pairs["task_a"], pairs["task_b"], strict=True)} == {
        frozenset(names)
        for names in (
            ("sst2", "cola"),
            ("embedded/movies-polarity", "cola"),
            ("sst2",),
            ("cola",),
            ("embedded/movies-polarity",),
        )
    }
    matrix = similarity_matrix(similarity_summary(pairs), vector="bias", removed=0)
    with pytest.raises(ArgumentError, match="missing pairs: embedded/movies-polarity and sst2"):
        cluster_tasks(matrix)


def pairs_of_two_tasks(seeds: int, replicates: int, truth: float = 0.3) -> pd.DataFrame:
    """One replicate per layer: each run takes its own noise into all its pairs."""
    generator = np.random.default_rng([10, seeds])
    runs = [(task, seed) for task in "ab" for seed in range(seeds)]
    noise = {run: 0.05 * generator.normal(size=replicates) for run in runs}
    parts = []
    for (a, one), (b, other) in itertools.combinations(runs, 2):
        value = truth + noise[a, one] + noise[b, other] + 0.02 * generator.normal(size=replicates)
        told = {"task_a": a, "task_b": b, "seed_a": one, "seed_b": other, "value": value}
        parts.append(pd.DataFrame({"layer": range(replicates), **told}))
    whole = pd.concat(parts, ignore_index=True)
    return whole.assign(vector="weight", measure="cosine", removed=0, floor=0.0, floor_high=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_simulated_intervals_over_seeds_cover(seeds: int) -> None:
    table = similarity_summary(pairs_of_two_tasks(seeds, 400))
    within = table["task_a"] == table["task_b"]
    covered = (table["low"] <= 0.3) & (table["high"] >= 0.3)
    assert covered[~within].mean() >= 0.93
    if seeds > 2:
        assert covered[within].mean() >= 0.93
    else:
        assert table.loc[within, "low"].isna().all(), "one pair has no spread"


def similar_tasks(generator: np.random.Generator, tasks: int, replicates: int) -> pd.DataFrame:
    """A summary of `replicates` cells: tasks take part in what all share to different degrees; mean 0.25 and 0.6."""
    part = generator.normal(0.5, 0.2, size=(replicates, tasks))
    own = generator.normal(0.6, 0.15, size=(replicates, tasks))
    rows = []
    for a, b in itertools.combinations_with_replacement(range(tasks), 2):
        value = part[:, a] * part[:, b] + 0.03 * generator.normal(size=replicates) if a != b else own[:, a]
        cells = pd.DataFrame(
            {"layer": range(replicates), "value": value, "task_a": f"t{a}", "task_b": f"t{b}"}
        )
        rows.append(
            cells.assign(vector="weight", measure="cosine", removed=0, floor=0.0, disattenuated=value)
        )
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize("tasks", [4, 8])
def test_simulated_intervals_over_tasks_cover(tasks: int) -> None:
    found = similarity_contrast(similar_tasks(np.random.default_rng(tasks), tasks, 250))
    truth = {"between": 0.25, "within": 0.6, "gap": 0.35, "disattenuated": 0.25}
    inside = {
        quantity: ((rows["low"] <= truth[quantity]) & (truth[quantity] <= rows["high"])).mean()
        for quantity, rows in found.groupby("quantity")
        if quantity in truth
    }
    assert min(inside.values()) >= 0.92, inside
    assert np.mean(list(inside.values())) >= 0.93, inside


def test_a_task_without_a_pair_has_no_part_in_the_interval() -> None:
    summary = similar_tasks(np.random.default_rng(2), 6, 1)
    lonely = (summary["task_a"] == "t5") ^ (summary["task_b"] == "t5")
    summary.loc[lonely, "disattenuated"] = np.nan
    rows = similarity_contrast(summary).set_index("quantity")
    fewer = similarity_contrast(summary[~lonely & (summary["task_a"] != "t5")]).set_index("quantity")
    assert rows.loc["disattenuated"].tolist() == fewer.loc["disattenuated"].tolist()
    assert rows["tasks"].to_dict() == {"between": 6, "within": 6, "floor": 6, "disattenuated": 5, "gap": 6}


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ArgumentError, match="fewer than two runs"):
        vector_similarity(planted().query("key == 'alone 0'"))
    with pytest.raises(
        ArgumentError, match=r"vectors\['vector'\] holds \['gain'\]; allowed are \['bias', 'weight'\]"
    ):
        vector_similarity(planted().assign(vector="gain"))
    with pytest.raises(ArgumentError, match="outliers=383"):
        vector_similarity(planted(), outliers=383)
    with pytest.raises(ArgumentError, match="null_direction='zeros'"):
        vector_similarity(planted(), null_direction="zeros")
