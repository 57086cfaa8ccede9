"""Overlap is 1 for the same mask, 0 by chance whatever the densities, and called real no more often than it should."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.mask_statistics import (
    MaskRun,
    dead_units,
    density_table,
    mask_runs,
    overlap,
    overlap_cells,
    overlap_table,
)
from tests.training.tiny import tiny_bert

SHAPES = {
    f"adapter.layers.{layer}.ffn_output.{side}.weight": shape
    for layer in range(3)
    for side, shape in (("down", (8, 40)), ("up", (40, 8)))
}


def even(generator: np.random.Generator, densities: dict[str, float]) -> dict[str, np.ndarray]:
    """A mask drawn evenly, with exactly its share kept in each tensor."""
    kept = {}
    for name, shape in SHAPES.items():
        flat = np.zeros(np.prod(shape), bool)
        flat[: round(densities[name] * flat.size)] = True
        kept[name] = generator.permutation(flat).reshape(shape)
    return kept


def by_threshold(scores: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """The best scores of all tensors together."""
    cut = np.quantile(np.concatenate([np.ravel(score) for score in scores.values()]), 1 - density)
    return {name: score > cut for name, score in scores.items()}


def run_of(kept: dict[str, np.ndarray], **facts: Any) -> MaskRun:
    places = pd.DataFrame(
        {
            "layer": [int(name.split(".")[2]) for name in kept],
            "site": "ffn_output",
            "entries": [mask.size for mask in kept.values()],
            "kept": [int(mask.sum()) for mask in kept.values()],
        },
        index=pd.Index(list(kept), name="name"),
    )
    known: dict[str, Any] = {
        "key": "k",
        "adapter": "Pfeiffer()",
        "task": "a",
        "scorer": "snip",
        "sparsity": 0.8,
        "control": "none",
        "init_seed": 0,
        "data_seed": 0,
    }
    return MaskRun(**{**known, **facts}, kept=kept, places=places)


FLAT = dict.fromkeys(SHAPES, 0.2)


def test_the_same_mask_overlaps_wholly_and_its_complement_less_than_by_chance() -> None:
    mask = even(np.random.default_rng(0), FLAT)
    same = overlap(mask, mask)
    assert (same["jaccard"], same["corrected"], same["shared"]) == (1, 1, 1)
    assert same["p"] < 1e-12
    opposite = overlap(mask, {name: ~kept for name, kept in mask.items()})
    assert (opposite["jaccard"], opposite["shared"]) == (0, 0)
    assert opposite["corrected"] < opposite["low"] < 0 < opposite["high"] < 1


def test_the_expected_overlap_of_small_masks_counts_its_curvature() -> None:
    """Masks of 2 in 4 entries share 0, 1 or 2 of them with chances 1/6, 4/6 and 1/6."""
    first, second = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool)
    # J(c) = c/(4 - c) around the mean 1 with the variance 1/3: J(1) + J''(1)/2 · 1/3 and J''/2 = 4/(4 - 1)³
    assert overlap({"w": first}, {"w": second})["expected"] == pytest.approx(1 / 3 + 4 / 27 / 3)


def test_dense_masks_cannot_share_less_than_they_must() -> None:
    first, second = np.ones((2, 1, 10), bool)
    first[0, 0] = second[0, 1] = False  # 9 of 10 entries each: they share 8 at least
    found = overlap({"w": first}, {"w": second})
    assert found["jaccard"] == pytest.approx(8 / 10)
    assert found["low"] == pytest.approx(found["corrected"])


def test_half_a_mask_in_common() -> None:
    generator = np.random.default_rng(1)
    shape = (100, 100)
    first, second = np.zeros(10_000, bool), np.zeros(10_000, bool)
    order = generator.permutation(10_000)
    first[order[:2000]], second[order[1000:3000]] = True, True
    found = overlap({"w": first.reshape(shape)}, {"w": second.reshape(shape)})
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["shared"] == 0.5
    assert found["expected"] == pytest.approx(1 / 9, abs=1e-4)  # pq/(p + q - pq) at p = q = 0.2
    assert found["corrected"] == pytest.approx((1 / 3 - 1 / 9) / (1 - 1 / 9), abs=1e-4)


def test_the_null_is_the_hypergeometric_one() -> None:
    generator = np.random.default_rng(2)
    densities = dict(zip(SHAPES, (0.05, 0.9, 0.3, 0.3, 0.6, 0.1), strict=True))
    other = dict(zip(SHAPES, (0.5, 0.2, 0.3, 0.7, 0.6, 0.02), strict=True))
    fixed = even(generator, densities)
    found = overlap(fixed, even(generator, other))
    drawn = np.array([overlap(fixed, even(generator, other))["jaccard"] for _ in range(1000)])
    assert found["expected"] == pytest.approx(drawn.mean(), abs=3 * drawn.std() / np.sqrt(1000))
    low, high = (
        (np.quantile(drawn, q) - found["expected"]) / (1 - found["expected"]) for q in (0.025, 0.975)
    )
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.008)
    one = {name: fixed[name] for name in list(SHAPES)[:1]}
    two = even(generator, other)
    name, mask = next(iter(one.items()))
    exact = stats.hypergeom.sf((mask & two[name]).sum() - 1, mask.size, mask.sum(), two[name].sum())
    assert overlap(one, {name: two[name]})["p"] == pytest.approx(exact, abs=0.03)


def test_independent_masks_are_called_alike_as_often_as_the_level_says() -> None:
    generator = np.random.default_rng(3)
    densities = dict(zip(SHAPES, (0.5, 0.4, 0.2, 0.1, 0.05, 0.05), strict=True))
    found = pd.DataFrame(
        [overlap(even(generator, densities), even(generator, densities)) for _ in range(1000)]
    )
    assert abs(found["corrected"].mean()) < 0.003
    outside = (found["corrected"] < found["low"]) | (found["corrected"] > found["high"])
    assert 0.03 <= outside.mean() <= 0.075
    assert 0.03 <= (found["p"] <= 0.05).mean() <= 0.075


def test_masks_that_concentrate_in_the_same_layers_fool_only_the_naive_null() -> None:
    generator = np.random.default_rng(4)
    scale = {name: 3.0 if ".0." in name else 0.5 for name in SHAPES}

    def drawn() -> dict[str, np.ndarray]:
        return by_threshold(
            {name: scale[name] * generator.exponential(size=SHAPES[name]) for name in SHAPES}, 0.2
        )

    found = pd.DataFrame([overlap(drawn(), drawn()) for _ in range(200)])
    assert found["naive"].mean() > 0.15
    assert abs(found["corrected"].mean()) < 0.01
    assert (found["p"] <= 0.05).mean() <= 0.095


def test_what_leaves_no_choice_has_no_overlap_beyond_chance() -> None:
    full = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    found = overlap(full, even(np.random.default_rng(5), FLAT))
    assert np.isnan([found["corrected"], found["p"], found["low"]]).all()
    assert found["shared"] == 1
    empty = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    assert np.isnan(overlap(empty, empty)["jaccard"])
    with pytest.raises(ArgumentError, match="same names and shapes"):
        overlap(full, {name: mask.T for name, mask in full.items()})


def confounded() -> list[MaskRun]:
    """Magnitude: the mask is the initial weights'. SNIP: weights times what the task adds. Random: neither."""
    runs = []
    generator = np.random.default_rng(6)
    weights = {
        seed: {name: np.abs(generator.normal(size=shape)) for name, shape in SHAPES.items()}
        for seed in range(3)
    }
    for task, seed, scorer in itertools.product("abc", range(3), ("magnitude", "snip", "random")):
        noise = {name: np.abs(generator.normal(size=shape)) for name, shape in SHAPES.items()}
        look = {"magnitude": (1, 0), "snip": (1, 1), "random": (0, 1)}[scorer]
        scores = {name: weights[seed][name] ** look[0] * noise[name] ** look[1] for name in SHAPES}
        facts = {"task": task, "scorer": scorer, "init_seed": seed, "key": f"{task}{seed}{scorer}"}
        runs.append(run_of(by_threshold(scores, 0.2), **facts))
    return runs


def test_the_shared_initialisation_shows_in_its_cells() -> None:
    table = overlap_table([*confounded(), run_of(even(np.random.default_rng(0), FLAT), control="shuffled")])
    assert len(table) == 27 * 26 // 2, "the masks of controls are not paired"
    cells = overlap_cells(table).set_index(["scorer", "same_init", "same_task"])
    mean: dict[Any, float] = cells["corrected"].to_dict()
    pairs: dict[Any, int] = cells["pairs"].to_dict()
    above: dict[Any, float] = cells["above"].to_dict()
    assert mean["magnitude", True, False] == pytest.approx(1)
    assert mean["snip", True, False] > 0.1
    for scorer in ("magnitude", "snip"):  # what overlaps is the initialisation, not the task
        assert abs(mean[scorer, False, True]) < 0.04
        assert abs(mean[scorer, False, False]) < 0.04
    assert abs(mean["random", True, False]) < 0.04
    assert pairs["snip", True, True] == 0
    assert np.isnan(mean["snip", True, True])
    random = [count for (scorer, *_), count in pairs.items() if scorer == "random"]
    assert random == [0, 9, 9, 18]
    assert above["magnitude", True, False] == 1
    assert (cells["least"].fillna(0) <= cells["most"].fillna(0)).all()
    other = run_of(even(np.random.default_rng(0), FLAT), sparsity=0.4)
    with pytest.raises(DataError, match="no two masks"):
        overlap_table([other, confounded()[0]])


def test_cells_are_means_and_ranges_of_their_pairs() -> None:
    table = overlap_table(confounded())
    cells = overlap_cells(table).set_index(["scorer", "same_init", "same_task"])
    for scorer, init, task in itertools.product(
        ("magnitude", "snip", "random"), (True, False), (True, False)
    ):
        own = table[table["same_scorer"] & (table["scorer_a"] == scorer)]
        own = own[(own["same_init"] == init) & (own["same_task"] == task)]
        if own.empty:
            continue
        row = cells.loc[(scorer, init, task)]
        values = own["corrected"]
        assert row[["corrected", "least", "most"]].tolist() == pytest.approx(
            [values.mean(), values.min(), values.max()]
        )
        assert row["naive"] == pytest.approx(own["naive"].mean())
        assert row["above"] == pytest.approx((values > own["high"]).mean())
        assert row["pairs"] == len(own)
    random = cells.loc["random"]
    assert (random["above"].dropna() < 0.5).all(), "chance is not above its own interval"


def test_tensors_without_a_layer_keep_their_density() -> None:
    mask = even(np.random.default_rng(0), FLAT)
    run = run_of(mask)
    places = run.places.assign(layer=pd.array([None, None, 1, 1, 2, 2], dtype="Int64"))
    found = density_table([replace(run, places=places)])
    assert found["entries"].sum() == sum(kept.size for kept in mask.values())
    assert found["layer"].isna().sum() == 1


def test_units_that_lost_all_they_read_or_write_are_dead() -> None:
    generator = np.random.default_rng(7)
    mask = even(generator, dict.fromkeys(SHAPES, 0.5))
    down, up = list(SHAPES)[:2]
    mask[down][3] = False
    mask[up][:, 3] = mask[up][:, 5] = False
    found = dead_units([run_of(mask)]).set_index("layer")
    assert found["dead"].to_dict() == {0: 2, 1: 0, 2: 0}
    assert set(found["units"]) == {8}
    assert (found["expected"] < 1e-6).all()

    sparse = {name: 0.04 if "down" in name else 0.08 for name in SHAPES}
    counts = np.array([dead_units([run_of(even(generator, sparse))])["dead"] for _ in range(400)])
    table = dead_units([run_of(even(generator, sparse))])
    assert table["expected"].iloc[0] == pytest.approx(counts.mean(), abs=0.08)
    half = (table["high"] - table["expected"]).iloc[0] / stats.norm.ppf(0.975)
    assert half == pytest.approx(counts.std(), rel=0.08)


def test_simulated_even_masks_have_no_more_dead_units_than_chance() -> None:
    generator = np.random.default_rng(9)
    for density, expected in ((0.04, 2.5), (0.06, 1.1), (0.1, 0.2)):
        found = dead_units([run_of(even(generator, dict.fromkeys(SHAPES, density))) for _ in range(200)])
        assert found["expected"].mean() == pytest.approx(expected, abs=0.1)
        assert (found["dead"] > found["high"]).mean() <= 0.05
    down, up = list(SHAPES)[:2]
    unfair = even(generator, dict.fromkeys(SHAPES, 0.3))
    unfair[down][:3] = unfair[up][:, :3] = False
    first = dead_units([run_of(unfair)]).iloc[0]
    assert first["dead"] > first["high"]


def test_real_masks_know_where_they_are() -> None:
    attachment = ht.attach(tiny_bert(), ht.Pfeiffer(bottleneck=4, init="normal"), seed=3)
    masks = ht.sparsify(attachment, scorer="magnitude", sparsity=0.5)
    run = MaskRun.of(masks, key="k", task="sst2")
    assert (run.scorer, run.sparsity, run.control, run.init_seed) == ("magnitude", 0.5, "none", 3)
    assert run.adapter == "Pfeiffer"
    by_layer = density_table([run])
    expected = masks.table("layer")
    assert by_layer["density"].tolist() == pytest.approx(expected["density"].tolist())
    assert by_layer["layer"].tolist() == [0, 1, 2]
    assert density_table([run], by="tensor")["kept"].sum() == masks.entries - masks.removed
    assert len(dead_units([run])) == 3


def test_a_store_gives_the_masks_of_its_pruned_runs(make_spec: Any, tmp_path: Any) -> None:
    store = ht.RunStore(tmp_path / "store", keep="vectors")
    adapter = ht.Pfeiffer(bottleneck=4, init="normal")
    pruned = [
        make_spec(adapter=adapter, sparsity=ht.Sparsity("magnitude", 0.5), seed=seed) for seed in (1, 0)
    ]
    ht.sweep([*pruned, make_spec(adapter=adapter)], store)
    runs = mask_runs(store)
    assert [(run.task, run.init_seed) for run in runs] == [("sst2", 0), ("sst2", 1)]
    assert {run.key for run in runs} == {spec.key for spec in pruned}
    for run in runs:
        masks = store.masks(run.key)
        assert all(np.array_equal(run.kept[name], kept) for name, kept in masks.arrays().items())
    cells = overlap_cells(overlap_table(runs))
    assert cells["pairs"].tolist() == [0, 0, 1, 0]
    (tmp_path / "none").mkdir()
    assert mask_runs(ht.RunStore(tmp_path / "none")) == []
