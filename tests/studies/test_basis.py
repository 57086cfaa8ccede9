"""A planted basis is found, its size is where the curve bends, and independent vectors share nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies import basis_table, captured, task_basis
from hadamard_toolkit.studies.basis import _changes

LAYERS, WIDTH, SEEDS = 2, 24, 2


def study(
    tasks: int, shared: int, noise: float, seed: int = 0, own: float = 0.0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Vectors of tasks with random weights on `shared` directions, a part of their `own`, and noise of the seed."""
    generator = np.random.default_rng(seed)
    size = 2 * LAYERS * WIDTH
    directions = np.linalg.qr(generator.normal(size=(size, max(shared, 1))))[0].T.reshape(
        -1, 2, LAYERS, WIDTH
    )
    directions[:, 1] -= directions[:, 1].mean(axis=-1, keepdims=True)  # of b only what is not its mean counts
    parts = []
    for task in range(tasks):
        weights = generator.normal(size=len(directions)) * (shared > 0)
        alone = own * generator.normal(size=(2, LAYERS, WIDTH)) / np.sqrt(size)
        for run in range(SEEDS):
            change = np.einsum("k,kvlc->vlc", weights, directions) + alone
            change = change + noise * generator.normal(size=change.shape) / np.sqrt(size)
            vector, layer, coordinate = (axis.ravel() for axis in np.indices(change.shape))
            names = np.array(["weight", "bias"])[vector]
            parts.append(
                pd.DataFrame(
                    {
                        "key": f"{task}-{run}",
                        "task": f"task {task}",
                        "seed": run,
                        "layer": layer,
                        "vector": names,
                        "coordinate": coordinate,
                        "value": change.ravel() + (names == "weight"),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True), directions.reshape(len(directions), size)


def test_a_planted_basis_is_recovered_from_the_other_tasks() -> None:
    vectors, planted = study(tasks=7, shared=3, noise=0.0)
    basis = task_basis(vectors, "task 0")
    assert basis.shape == (3, 2 * LAYERS * WIDTH), "six tasks in three directions"
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-10)
    # columns of a basis are sorted: bias before weight
    planted = np.roll(planted, LAYERS * WIDTH, axis=1)
    np.testing.assert_allclose(planted @ basis.T @ basis, planted, atol=1e-10)
    assert captured(vectors, basis, 3).to_numpy() == pytest.approx(1)
    x = _changes(vectors, ("weight", "bias")).iloc[0].to_numpy()
    assert captured(vectors, basis, 2).iloc[0] == pytest.approx(((basis[:2] @ x) ** 2).sum() / (x**2).sum())


def test_directions_are_ordered_by_explained_norm_and_the_task_itself_has_no_part() -> None:
    vectors, _ = study(tasks=5, shared=3, noise=0.5)
    basis = task_basis(vectors, "task 0")
    means = _changes(vectors, ("weight", "bias")).groupby(level="task").mean().drop(index="task 0").to_numpy()
    explained = ((means @ basis.T) ** 2).sum(axis=0)
    assert explained.tolist() == sorted(explained, reverse=True)
    assert explained.sum() == pytest.approx((means**2).sum())
    elsewhere = (vectors["task"] == "task 0") & (vectors["coordinate"] == 3)
    changed = vectors.assign(value=vectors["value"] + 5.0 * elsewhere)
    np.testing.assert_array_equal(task_basis(changed, "task 0"), basis)
    assert not np.allclose(task_basis(changed, "task 1"), task_basis(vectors, "task 1"))


def test_the_curve_bends_at_the_number_of_planted_directions() -> None:
    vectors, _ = study(tasks=9, shared=3, noise=0.5, seed=1)
    table = basis_table(vectors, draws=5)
    means = table[table["task"] == "all tasks"].set_index(["basis", "k"])
    steps = means.loc["other tasks", "share"].diff()
    assert steps[3] > 5 * steps[4:].max()
    assert means.loc[("other tasks", 3), "excess_low"] > 0.3
    assert means.loc[("other tasks", 3), "low"] > means.loc[("permuted", 3), "high"]
    # one other seed of the task is worth more than any one direction of others
    assert means.loc[("own seeds", 1), "share"] > means.loc[("other tasks", 1), "share"]
    assert set(means.loc["own seeds"].index) == {1}
    assert means.loc[("other tasks", 3), "n"] == 9


def test_the_nulls_are_what_directions_without_meaning_capture() -> None:
    vectors, _ = study(tasks=6, shared=3, noise=0.5, seed=2)
    table = basis_table(vectors, draws=40)
    means = table[table["task"] == "all tasks"].set_index(["basis", "k"])["share"]
    free = 2 * LAYERS * WIDTH - LAYERS  # b has no mean
    assert means["random", 5] == pytest.approx(5 / free, rel=0.25)
    assert means["permuted", 5] == pytest.approx(5 / free, rel=0.35)


def test_independent_vectors_are_not_said_to_share_directions() -> None:
    """16 studies of 8 tasks, each with directions of its own: the interval of the excess leaves out 0 as by chance."""
    claims = []
    for seed in range(16):
        vectors, _ = study(tasks=8, shared=0, noise=0.3, seed=seed, own=1.0)
        table = basis_table(vectors, draws=2)
        row = table[
            (table["task"] == "all tasks") & (table["basis"] == "other tasks") & (table["k"] == 3)
        ].iloc[0]
        claims.append(row["excess_low"] > 0)
    assert np.mean(claims) <= 0.025 + 2.5 * np.sqrt(0.025 * 0.975 / 16)


def test_bias_counts_without_its_mean_and_parts_can_be_chosen() -> None:
    vectors, _ = study(tasks=4, shared=3, noise=0.5)
    # another mean in every layer
    moved = vectors.assign(value=vectors["value"] + (2.0 + vectors["layer"]) * (vectors["vector"] == "bias"))
    np.testing.assert_allclose(task_basis(moved, "task 0"), task_basis(vectors, "task 0"), atol=1e-8)
    alone = task_basis(vectors, "task 0", parts=("weight",))
    assert alone.shape[1] == LAYERS * WIDTH
    assert captured(vectors, alone, 1, parts=("weight",)).between(0, 1).all()


def test_tasks_that_share_texts_do_not_describe_each_other() -> None:
    vectors, _ = study(tasks=4, shared=3, noise=0.5)
    named = vectors.assign(
        task=vectors["task"].replace({"task 0": "sst2", "task 1": "embedded/movies-polarity"})
    )
    apart = named[named["task"] != "embedded/movies-polarity"]
    np.testing.assert_array_equal(task_basis(named, "sst2"), task_basis(apart, "sst2"))
    assert len(task_basis(named, "task 2")) == 3


def test_what_cannot_be_asked_is_told() -> None:
    vectors, _ = study(tasks=3, shared=2, noise=0.1)
    basis = task_basis(vectors, "task 0")
    with pytest.raises(ArgumentError, match="task='task 9'"):
        task_basis(vectors, "task 9")
    with pytest.raises(ArgumentError, match="no other task"):
        task_basis(vectors[vectors["task"] == "task 0"], "task 0")
    for k in (0, 3):
        with pytest.raises(ArgumentError, match=f"k={k}"):
            captured(vectors, basis, k)
    with pytest.raises(ArgumentError, match="basis has shape"):
        captured(vectors, basis, 1, parts=("bias",))
    with pytest.raises(ArgumentError, match=r"parts=\(\) is not allowed; name at least one"):
        task_basis(vectors, "task 0", parts=())
    with pytest.raises(ArgumentError, match="parts='norm'"):
        task_basis(vectors, "task 0", parts=("norm",))
    with pytest.raises(DataError, match="same layers"):
        task_basis(vectors[(vectors["key"] != "1-0") | (vectors["layer"] == 0)], "task 0")
