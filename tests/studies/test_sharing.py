"""Shared vectors: combined as stated, counted once, and judged by an interval that holds its level."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies.sharing import (
    BARE,
    SCHEMES,
    UNSHARED,
    Scheme,
    combine,
    fieller,
    goal_reached,
    parameters_per_task,
    sharing_by_task,
    sharing_summary,
)

NAMES = ("attention_output.weight", "attention_output.bias", "attention_norm.weight", "attention_norm.bias")
LAYERS, WIDTH = 3, 8
IDENTITY = {name: np.full((LAYERS, WIDTH), float(name.endswith("weight")), np.float32) for name in NAMES}
BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
TASKS = ("a", "b", "c", "d")


def planted() -> dict[str, dict[str, np.ndarray]]:
    """Vectors of four tasks; every array differs."""
    generator = np.random.default_rng(0)
    return {
        task: {name: generator.normal(size=(LAYERS, WIDTH)).astype(np.float32) for name in NAMES}
        for task in TASKS
    }


def test_means_own_vectors_and_the_identity_are_what_they_are_called() -> None:
    vectors = planted()
    weight, bias, gain, shift = NAMES
    mean = {name: np.mean([vectors[task][name] for task in TASKS], axis=0) for name in NAMES}
    others = {name: np.mean([vectors[task][name] for task in "acd"], axis=0) for name in NAMES}

    def of(scheme: str) -> dict[str, np.ndarray]:
        return combine(vectors, "b", BY_NAME[scheme], IDENTITY)

    for name in NAMES:
        np.testing.assert_array_equal(of("own")[name], vectors["b"][name])
        np.testing.assert_array_equal(of(BARE)[name], IDENTITY[name])
        np.testing.assert_allclose(of("mean")[name], mean[name], atol=1e-6)
        np.testing.assert_allclose(of("leave-one-out")[name], others[name], atol=1e-6)
    half = of("shared W, own b")
    np.testing.assert_allclose(half[weight], mean[weight], atol=1e-6)
    np.testing.assert_array_equal(half[bias], vectors["b"][bias])
    np.testing.assert_allclose(half[gain], mean[gain], atol=1e-6)
    other_half = of("own W, shared b")
    np.testing.assert_array_equal(other_half[weight], vectors["b"][weight])
    np.testing.assert_allclose(other_half[bias], mean[bias], atol=1e-6)
    own_norm = of("mean, own norm")
    np.testing.assert_array_equal(own_norm[shift], vectors["b"][shift])
    np.testing.assert_allclose(own_norm[weight], mean[weight], atol=1e-6)


def test_another_task_is_one_other_task_and_the_permutation_keeps_each_layers_values() -> None:
    vectors, weight, bias = planted(), *NAMES[:2]
    drawn = set()
    for seed in range(20):
        found = combine(vectors, "b", BY_NAME["another task"], IDENTITY, seed=seed)
        [source] = [t for t in TASKS if np.array_equal(found[weight], vectors[t][weight])]
        np.testing.assert_array_equal(found[bias], vectors[source][bias])
        drawn.add(source)
    assert drawn == {"a", "c", "d"}

    mean = combine(vectors, "b", BY_NAME["mean"], IDENTITY)
    permuted = combine(vectors, "b", BY_NAME["permuted"], IDENTITY, seed=1)
    np.testing.assert_allclose(np.sort(permuted[weight]), np.sort(mean[weight]), atol=1e-6)
    assert not np.allclose(permuted[weight], mean[weight])
    order = [int(np.argmin(np.abs(mean[weight][0] - value))) for value in permuted[weight][0]]
    np.testing.assert_allclose(permuted[bias][0], mean[bias][0][order], atol=1e-6)
    np.testing.assert_array_equal(permuted[NAMES[2]], mean[NAMES[2]])
    again = combine(vectors, "b", BY_NAME["permuted"], IDENTITY, seed=1)
    np.testing.assert_array_equal(again[weight], permuted[weight])


def test_layers_without_an_adapter_stay_without() -> None:
    vectors, name = planted(), NAMES[0]
    gap = IDENTITY | {name: IDENTITY[name].copy()}
    for arrays in (gap, *vectors.values()):
        arrays[name][1] = np.nan
    for scheme in SCHEMES:
        found = combine(vectors, "b", scheme, gap)[name]
        assert np.isfinite(found).all(axis=1).tolist() == [True, False, True], scheme


def test_shared_vectors_are_counted_once_and_divided() -> None:
    sizes = {"weight": 9216, "bias": 9216, "norm": 18432}  # BERT-base
    cost = {scheme.name: parameters_per_task(sizes, scheme, 8) for scheme in SCHEMES}
    assert cost["own"] == 36864
    assert cost["mean"] == cost["leave-one-out"] == cost["another task"] == 36864 / 8
    assert cost["mean, own norm"] == 18432 / 8 + 18432
    assert cost["shared W, own b"] == 9216 / 8 + 9216 + 18432 / 8
    assert cost["no vectors, shared norm"] == 18432 / 8
    assert cost[BARE] == 0
    assert parameters_per_task(sizes, BY_NAME["mean"], 1) == 36864


def test_bad_input_is_named() -> None:
    vectors = planted()
    with pytest.raises(ArgumentError, match="weight='sum'"):
        Scheme("x", "sum", "own", "own")
    with pytest.raises(ArgumentError, match="no task to share with"):
        combine({"a": vectors["a"]}, "a", BY_NAME["mean"], IDENTITY)
    with pytest.raises(ArgumentError, match=r"'c'.*shapes"):
        combine(vectors | {"c": {}}, "a", BY_NAME["mean"], IDENTITY)
    with pytest.raises(ArgumentError, match="target='z'"):
        combine(vectors, "z", BY_NAME["mean"], IDENTITY)


def scores(tasks: int = 8, seeds: int = 2, noise: float = 0.004, seed: int = 0) -> pd.DataFrame:
    """A planted truth: "mean" keeps all of the unshared score, "another task" half of the gain."""
    generator = np.random.default_rng(seed)
    rows = []
    for task in range(tasks):
        floor, gain = generator.uniform(0.6, 0.7), generator.uniform(0.08, 0.12)
        for run in range(seeds):
            truth = {UNSHARED: 1.0, "mean": 1.0, "another task": 0.5, BARE: 0.0}
            costs = {UNSHARED: 0.04, "mean": 0.005, "another task": 0.005, BARE: 0.0}
            for scheme, kept in truth.items():
                score = floor + kept * gain + generator.normal(scale=noise)
                rows.append((f"t{task}", run, scheme, score, costs[scheme] * 1e4, costs[scheme]))
    return pd.DataFrame(rows, columns=["task", "seed", "scheme", "score", "parameters", "percent"])


def test_a_shared_vector_that_suffices_is_found_and_one_that_does_not_is_not() -> None:
    summary = sharing_summary(scores())
    assert summary.index.tolist() == [UNSHARED, "mean", "another task", BARE]
    assert summary["noninferior"].tolist() == [False, True, False, False]
    assert summary.loc["mean", "share"] == pytest.approx(1, abs=0.01)
    assert summary.loc["mean", "gain_share_low"] < 1 < summary.loc["mean", "gain_share_high"]
    assert summary.loc["another task", "gain_share"] == pytest.approx(0.5, abs=0.05)
    assert summary.loc[BARE, ["gain_share", "gain_share_low", "gain_share_high"]].tolist() == [0, 0, 0]
    assert summary.loc[UNSHARED, ["share", "gain_share"]].tolist() == [1, 1]
    assert set(summary["tasks"]) == {8}
    assert set(summary["runs"]) == {16}
    assert goal_reached(summary) == {
        "within": ["mean", "another task", BARE],
        "met": ["mean"],
        "shown": ["mean"],
    }
    assert goal_reached(summary, percent=0.001)["met"] == []
    at_the_goal = summary.loc["mean", "percent"]
    assert goal_reached(summary, percent=at_the_goal)["met"] == ["mean"], "no more than the goal is within it"
    assert goal_reached(summary, percent=at_the_goal, share=summary.loc["mean", "share"])["met"] == ["mean"]


def test_the_reference_is_the_one_whose_head_is_retrained_too() -> None:
    """With own vectors a retrained head adds a point: of that, and not of the unshared score, is what sharing keeps."""
    table = scores(noise=0.0)
    own = table[table["scheme"] == UNSHARED].assign(scheme="own", score=lambda t: t["score"] + 0.01)
    table = pd.concat([table, own], ignore_index=True)
    summary = sharing_summary(table)
    assert set(summary["reference"]) == {"own"}
    assert summary.loc["own", ["share", "gain_share"]].tolist() == [1, 1]
    assert summary.loc["mean", "share"] == summary.loc[UNSHARED, "share"] < 1
    unshared = sharing_summary(table, reference=UNSHARED)
    assert unshared.loc["mean", "share"] == pytest.approx(1)
    assert set(sharing_summary(scores())["reference"]) == {UNSHARED}, "the only one that was measured"


def test_runs_without_every_scheme_do_not_count() -> None:
    whole = scores()
    lame = whole[~((whole["task"] == "t3") & (whole["seed"] == 1) & (whole["scheme"] == "mean"))]
    summary = sharing_summary(lame)
    assert (summary.loc["mean", "runs"], summary.loc["mean", "incomplete"]) == (15, 1)
    by_task = sharing_by_task(whole)
    expected = whole[(whole["task"] == "t2") & (whole["scheme"] == "mean")]["score"].mean()
    assert by_task.loc["mean", "t2"] == pytest.approx(expected)
    with pytest.raises(ArgumentError, match="more than one row"):
        sharing_summary(pd.concat([whole, whole]))
    with pytest.raises(ArgumentError, match="no task and seed of table has a score for every scheme"):
        sharing_summary(whole[(whole["task"] == "t0") != (whole["scheme"] == "mean")])


def test_two_tasks_are_no_proof() -> None:
    summary = sharing_summary(scores(tasks=2, noise=0.02))
    assert not summary["noninferior"].any()
    one = sharing_summary(scores(tasks=1))
    assert one["share_low"].isna().all()
    assert not one["noninferior"].any()


def test_the_ratios_interval_covers_at_its_level() -> None:
    generator, held, wrongly = np.random.default_rng(1), 0, 0
    draws = 1500
    for _ in range(draws):
        below = generator.normal(0.75, 0.06, size=8)
        above = 0.98 * below + generator.normal(0, 0.01, size=8)
        _, low, high = fieller(above, below)
        held += low <= 0.98 <= high
        wrongly += low > 0.98
    assert 0.935 < held / draws < 0.965
    assert wrongly / draws < 0.035


def test_the_ratio_has_no_interval_where_the_denominator_may_be_zero() -> None:
    generator = np.random.default_rng(2)
    ratio, low, high = fieller(generator.normal(0, 0.02, 8), generator.normal(0.001, 0.02, 8))
    assert np.isfinite([ratio, low, high]).tolist() == [True, False, False]


def test_noninferiority_is_wrong_no_more_often_than_its_level() -> None:
    """Truth exactly at the margin, 98 % of the unshared score, for 400 schemes at once."""
    generator = np.random.default_rng(3)
    base = generator.normal(0.75, 0.06, size=8)
    by_scheme = {f"null {place}": 0.98 * base + generator.normal(0, 0.01, size=8) for place in range(400)}
    rows = [
        (f"t{task}", 0, scheme, score, 1.0, 0.001)
        for scheme, values in {UNSHARED: base, **by_scheme, BARE: base - 0.1}.items()
        for task, score in enumerate(values)
    ]
    table = pd.DataFrame(rows, columns=["task", "seed", "scheme", "score", "parameters", "percent"])
    summary = sharing_summary(table)
    null = summary.loc[list(by_scheme)]
    assert 0.03 < (null["p"] < 0.05).mean() < 0.075
    assert not null["noninferior"].any(), "none of 400 is left after Holm"
