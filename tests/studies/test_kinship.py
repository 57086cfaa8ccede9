"""Tasks that are alike are joined first; Mantel's test sees a common kinship, and no kinship in noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies.kinship import cluster_tasks, mantel
from hadamard_toolkit.studies.similarity import (
    ALL_LAYERS,
    similarity_matrix,
    similarity_summary,
    vector_similarity,
)
from tests.studies.test_similarity import planted, table


def test_clusters_join_what_is_alike_first() -> None:
    summary = similarity_summary(vector_similarity(planted(), permutations=19))
    merges = cluster_tasks(similarity_matrix(summary, vector="weight"))
    assert merges["members"].iloc[0] == "alike a + alike b"
    assert merges["distance"].is_monotonic_increasing
    assert merges["size"].iloc[-1] == 4
    order = merges.attrs["order"]
    assert abs(order.index("alike a") - order.index("alike b")) == 1


def square(values: np.ndarray) -> pd.DataFrame:
    names = [f"task {place}" for place in range(len(values))]
    return pd.DataFrame(values, names, names)


def distances(generator: np.random.Generator, count: int) -> np.ndarray:
    points = generator.normal(size=(count, 2))
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


@pytest.mark.parametrize("count", [6, 9])
def test_mantel_keeps_its_level_though_pairs_share_tasks(count: int) -> None:
    generator = np.random.default_rng(6)
    p = [
        mantel(
            square(distances(generator, count)),
            square(distances(generator, count)),
            permutations=199,
            seed=trial,
        )["p"].item()
        for trial in range(200)
    ]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.085
    assert 0.4 <= np.mean(np.array(p) <= 0.5) <= 0.6


def test_mantel_finds_a_common_order_and_counts_its_permutations() -> None:
    generator = np.random.default_rng(7)
    truth = distances(generator, 8)
    noisy = truth + 0.2 * distances(generator, 8)
    order = generator.permutation(8)
    found = mantel(square(truth), square(noisy).iloc[order, order])  # tasks are matched by name
    assert found["p"].item() < 0.01
    assert found["value"].item() > 0.7
    assert found[["tasks", "pairs", "permutations"]].iloc[0].tolist() == [8, 28, 9999]
    exact = mantel(square(truth[:5, :5]), square(truth[:5, :5]))
    assert exact[["permutations", "exact"]].iloc[0].tolist() == [120, True]
    assert exact["p"].item() == pytest.approx(1 / 120)
    two_sided = mantel(square(truth), square(-noisy), alternative="two-sided")
    assert two_sided["p"].item() < 0.01 < 0.9 < mantel(square(truth), square(-noisy))["p"].item()


def tasks_in_layers(
    replicates: int, *, kinship: float, tasks: int = 8, seeds: int = 2, width: int = 256, seed: int = 0
) -> pd.DataFrame:
    """One replicate per layer: all tasks share a direction, and the halves of them `kinship` more, in W as in b.

    Some tasks are noisier than others, and so in both vectors: their runs have reliabilities from 0.3 to 0.9.
    """
    generator = np.random.default_rng([8, seed])
    shape = (replicates, 2, width)
    common = generator.normal(size=shape)
    halves = [generator.normal(size=shape) for _ in range(2)]
    reliability = generator.uniform(0.3, 0.9, size=(tasks, replicates, 1, 1))
    runs = {}
    for task in range(tasks):
        own = generator.normal(size=shape)
        truth = np.sqrt(0.7 - kinship) * common + np.sqrt(kinship) * halves[task % 2] + np.sqrt(0.3) * own
        for s in range(seeds):
            noise = np.sqrt(1 / reliability[task] - 1) * generator.normal(size=shape)
            runs[f"task {task}", s] = 0.02 * (truth + noise)
    return table(runs)


def mantel_tests(vectors: pd.DataFrame, value: str) -> np.ndarray:
    """p of W with b in every layer, without tasks that have no similarity free of noise."""
    summary = similarity_summary(vector_similarity(vectors, outliers=0, permutations=19))
    found = []
    for layer, part in summary[summary["measure"] == "cosine"].groupby("layer"):
        if layer == ALL_LAYERS:
            continue
        both = [similarity_matrix(part, vector=v, layer=layer, value=value) for v in ("weight", "bias")]
        known = [name for name in both[0].index if all(np.isfinite(m.loc[name, name]) for m in both)]
        if value == "value":  # by hand what is refused: as if there were no noise
            both = [m.mask(np.eye(len(m), dtype=bool), 1.0) for m in both]
        one, other = (m.loc[known, known] for m in both)
        found.append(mantel(one, other, permutations=199, seed=int(layer))["p"].item())
    return np.array(found)


def test_simulated_noise_is_no_kinship_once_it_is_taken_out() -> None:
    vectors = tasks_in_layers(100, kinship=0.0)
    assert (mantel_tests(vectors, "value") <= 0.05).mean() > 0.8, "noise alone orders the pairs alike"
    assert (mantel_tests(vectors, "disattenuated") <= 0.05).mean() <= 0.07
    summary = similarity_summary(vector_similarity(vectors.query("layer == 0"), outliers=0, permutations=19))
    raw = [similarity_matrix(summary, vector=vector, removed=0) for vector in ("weight", "bias")]
    with pytest.raises(ArgumentError, match=r"first has 0\.\d+ to 0\.\d+ on its diagonal.*disattenuated"):
        mantel(*raw)


def test_simulated_kinship_is_found() -> None:
    vectors = tasks_in_layers(40, kinship=0.2)
    assert (mantel_tests(vectors, "disattenuated") <= 0.05).mean() >= 0.8


def test_mantel_states_the_least_p_that_it_could_give() -> None:
    generator = np.random.default_rng(9)
    for kind, count, floor in ((3, 8, 1 / 56), (3, 6, 1 / 20), (2, 5, 1 / 10)):
        design = np.zeros((count, count))
        design[:kind, :kind] = 1
        np.fill_diagonal(design, 1)
        best = square(design + 1e-3 * distances(generator, count) * (1 - np.eye(count)))
        found = mantel(best, square(design))
        assert found["p_floor"].item() == pytest.approx(floor)
        assert found["p"].item() == pytest.approx(floor, rel=0.25 if count > 7 else 1e-9)
    free = mantel(square(distances(generator, 9)), square(distances(generator, 9)), permutations=199)
    assert free["p_floor"].item() == 1 / 200


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ArgumentError, match="same tasks"):
        mantel(square(np.eye(4)), square(np.eye(5)))
    with pytest.raises(ArgumentError, match=r"is \(4, 3\); a square table with the same tasks"):
        mantel(square(np.eye(4)).iloc[:, :3], square(np.eye(4)))
    points = np.random.default_rng(0)
    with pytest.raises(ArgumentError, match="at least 4"):  # six orders of three tasks tell nothing
        mantel(square(distances(points, 3)), square(distances(points, 3)))
    with pytest.raises(ArgumentError, match="all the same"):
        mantel(square(np.ones((8, 8))), square(np.ones((8, 8))))
