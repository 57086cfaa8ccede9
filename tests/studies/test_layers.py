"""Planted layers are found, choices are made on held-out rows alone, and noise is not taken for skill."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.layers import (
    greedy_elimination,
    layer_importance,
    leave_one_out,
    read_correct,
    read_kept,
    removal_curves,
    removal_paths,
    subset_band,
    taylor_scores,
    write_kept,
)
from hadamard_toolkit.studies.pruning import (
    against_chance,
    better_than_chance,
    kept_share,
    rank_agreement,
    smallest_set,
)

LAYERS = 4
WORTH = np.array([0.01, 0.12, 0.02, 0.06])  # what each planted layer adds


def subsets(layers: int = LAYERS) -> list[tuple[int, ...]]:
    return [kept for size in range(layers + 1) for kept in itertools.combinations(range(layers), size)]


def table(
    score: Callable[..., float], *, tasks: int = 2, seeds: int = 2, layers: int = LAYERS
) -> pd.DataFrame:
    """`score(task, seed, split, kept)` of every subset."""
    rows = [
        (f"{task}-{seed}", f"task {task}", seed, write_kept(kept), split, score(task, seed, split, kept))
        for task in range(tasks)
        for seed in range(seeds)
        for split in ("validation", "test")
        for kept in subsets(layers)
    ]
    return pd.DataFrame(rows, columns=["key", "task", "seed", "kept", "split", "score"])


def planted(task: int, seed: int, split: str, kept: tuple[int, ...]) -> float:
    return float(0.6 + WORTH[list(kept)].sum() + seed / 1000)


def noise(start: int, *, tasks: int = 2, seeds: int = 2, layers: int = LAYERS) -> pd.DataFrame:
    generator = np.random.default_rng(start)
    return table(lambda *_: generator.normal(0.8, 0.02), tasks=tasks, seeds=seeds, layers=layers)


def by_rows(
    rates: Callable[..., float], *, rows: int = 200, tasks: int = 1, seeds: int = 3, start: int = 0
) -> pd.DataFrame:
    """Tables that tell which rows are right: a row with u < rate is, with the same u for every subset."""
    found = table(planted, tasks=tasks, seeds=seeds)
    generator = np.random.default_rng(start)
    place = {
        run: generator.random(rows)
        for run in itertools.product(found["key"].unique(), ("validation", "test"))
    }
    right = [
        place[key, split] < rates(read_kept(kept))
        for key, split, kept in zip(found["key"], found["split"], found["kept"], strict=True)
    ]
    packed = [np.packbits(own).tobytes().hex() for own in right]
    return found.assign(n=rows, correct=packed, score=[own.mean() for own in right])


# tables and arrays -------------------------------------------------------------------------------------------------


def test_subsets_and_packed_rows_read_back() -> None:
    assert [write_kept(read_kept(text)) for text in ("", "3", "0,2,11")] == ["", "3", "0,2,11"]
    right = np.random.default_rng(0).random(21) < 0.5
    assert (read_correct(np.packbits(right).tobytes().hex(), 21) == right).all()


def test_importance_is_the_distance_from_the_identity() -> None:
    weight, bias = np.ones((3, 4)), np.zeros((3, 4))
    weight[1] = [1.5, 0.5, 1.5, 0.5]
    bias[2] = [3.0, 1.0, 3.0, 1.0]  # its mean, 2, does nothing behind W_O
    found = layer_importance({"weight": weight, "bias": bias}).set_index(["vector", "layer"])
    assert found.loc["weight", "l2"].tolist() == [0, 1, 0]
    assert found.loc["weight", "rms"].tolist() == [0, 0.5, 0]
    assert found.loc["bias", "rms"].tolist() == [0, 0, 1]
    assert found.loc["both", "l2"].tolist() == [0, 1, 2]
    whole = layer_importance({"bias": bias}, project=False).set_index("layer")
    assert whole.loc[2, "l2"] == pytest.approx(np.sqrt(20))

    coordinates = [
        ("k", "t", 0, layer, vector, place, values[layer, place])
        for vector, values in (("weight", weight), ("bias", bias))
        for layer in (0, 2)
        for place in range(4)
    ]
    columns = ["key", "task", "seed", "layer", "vector", "coordinate", "value"]
    of_table = layer_importance(pd.DataFrame(coordinates, columns=columns))
    assert sorted(set(of_table["layer"])) == [0, 2], "a layer without an adapter has no row"
    assert of_table.set_index(["vector", "layer"]).loc[("bias", 2), "rms"] == 1
    with pytest.raises(DataError, match="layers, d"):
        layer_importance({"weight": np.ones(4)})


def test_taylor_is_exact_on_a_linear_loss_and_fisher_on_its_formula() -> None:
    generator = np.random.default_rng(1)
    slopes, change = generator.normal(size=(5, 3, 4)), generator.normal(size=(3, 4))
    found = taylor_scores(slopes, change)
    for layer in range(
        3
    ):  # L_i(θ) = Σ slope θ: going back by Δ in one layer changes the mean loss by −Σ mean slope Δ
        exact = -np.mean([(slopes[row, layer] * change[layer]).sum() for row in range(5)])
        assert found.loc[layer, "increase"] == pytest.approx(exact)
        assert found.loc[layer, "taylor"] == pytest.approx(abs(exact))
        by_hand = sum(np.mean(slopes[:, layer, j] ** 2) * change[layer, j] ** 2 for j in range(4)) / 2
        assert found.loc[layer, "fisher"] == pytest.approx(by_hand)
    with pytest.raises(DataError, match="do not fit"):
        taylor_scores(slopes, change[:2])


# planted truth -----------------------------------------------------------------------------------------------------


def test_planted_worth_is_recovered_by_leaving_one_out_and_by_greedy_elimination() -> None:
    removals = table(planted)
    drops = leave_one_out(removals).pivot(index="key", columns="layer", values="drop")
    for _, row in drops.iterrows():
        assert row.to_numpy() == pytest.approx(WORTH)
    path = greedy_elimination(removals)
    for _, own in path.groupby("key"):
        assert own["removed"].tolist() == [-1, 0, 2, 3, 1]
        assert own["kept"].tolist() == ["0,1,2,3", "1,2,3", "1,3", "1", ""]


def test_two_layers_that_stand_in_for_one_another() -> None:
    """Each alone can go, not both: leaving one out sees nothing, the greedy path keeps exactly one."""
    removals = table(lambda t, s, split, kept: 0.9 if {1, 3} & set(kept) else 0.6)
    assert leave_one_out(removals)["drop"].eq(0).all()
    path = greedy_elimination(removals)
    last = path[path["size"] == 1]["kept"]
    assert set(last) <= {"1", "3"}


def test_equal_scores_go_by_loss_then_by_layer() -> None:
    removals = table(lambda *_: 0.5)
    assert greedy_elimination(removals)["removed"].tolist()[:5] == [-1, 0, 1, 2, 3]
    lossy = removals.assign(loss=[-WORTH[list(read_kept(kept))].sum() for kept in removals["kept"]])
    assert greedy_elimination(lossy)["removed"].tolist()[:5] == [-1, 0, 2, 3, 1]


def test_every_rule_removes_what_it_says() -> None:
    removals = table(lambda task, *rest: planted(task, *rest), tasks=3)
    values = {"norm": [4, 3, 2, 1], "fisher": [1, 2, 4, 3]}
    importance = pd.DataFrame(
        [
            (key, rule, layer, value)
            for key in removals["key"].unique()
            for rule, own in values.items()
            for layer, value in enumerate(own)
        ],
        columns=["key", "rule", "layer", "value"],
    )
    paths = removal_paths(removals, importance).set_index(["rule", "size", "key"])["kept"].sort_index()
    for rule, kept in {
        "greedy": "1,3",
        "consensus": "1,3",
        "norm": "0,1",
        "fisher": "2,3",
        "first": "2,3",
    }.items():
        assert set(paths[rule, 2]) == {kept}
    assert set(paths["last", 1]) == {"0"}
    curves = removal_curves(removals, paths.reset_index())
    own = curves[(curves["rule"] == "last") & (curves["key"] == "0-1")].sort_values("size", ascending=False)
    assert own["score"].tolist() == pytest.approx([0.811, 0.751, 0.731, 0.611, 0.601])
    assert own["difference"].tolist() == pytest.approx(own["score"] - 0.811)
    with pytest.raises(DataError, match="lacks values of rule 'norm'"):
        removal_paths(removals, importance[importance["layer"] > 0])


def test_consensus_of_a_task_comes_from_the_other_tasks() -> None:
    def odd_one_out(task: int, seed: int, split: str, kept: tuple[int, ...]) -> float:
        worth = WORTH if task else WORTH[::-1]
        return float(worth[list(kept)].sum())

    paths = removal_paths(table(odd_one_out, tasks=4))
    of = paths[(paths["rule"] == "consensus") & (paths["size"] == 1)].set_index("task")["kept"]
    assert set(of["task 0"]) == {"1"}, "what tasks 1 to 3 keep, though task 0 would keep layer 2"
    apart = removal_paths(table(odd_one_out, tasks=4), apart=[{"task 1", "task 2", "task 3"}])
    of = apart[(apart["rule"] == "consensus") & (apart["size"] == 1)].set_index("task")["kept"]
    assert set(of["task 1"]) == {"2"}, "task 0 is the only other one left"
    assert "consensus" not in set(removal_paths(table(planted, tasks=1))["rule"])


def test_choices_do_not_move_with_the_test_rows() -> None:
    """The test half of the table is replaced by other numbers: every path, and the smallest set, stay as they were."""
    removals = by_rows(lambda kept: 0.6 + WORTH[list(kept)].sum(), tasks=2)
    changed = removals.copy()
    test = changed["split"] == "test"
    changed.loc[test, "score"] = np.random.default_rng(0).random(test.sum())
    changed.loc[test, "correct"] = changed.loc[test, "correct"].to_numpy()[::-1]
    pd.testing.assert_frame_equal(removal_paths(removals), removal_paths(changed))
    chosen = [
        smallest_set(one, removal_paths(one), margin=0.05)[["task", "size", "kept"]]
        for one in (removals, changed)
    ]
    pd.testing.assert_frame_equal(*chosen)
    with pytest.raises(ArgumentError, match="held-out"):
        greedy_elimination(removals, split="test")


# chance ------------------------------------------------------------------------------------------------------------


def test_the_best_subset_has_the_least_p() -> None:
    removals = table(planted, tasks=1, seeds=1)
    found = against_chance(removals, removal_paths(removals)).set_index(["rule", "size"])
    assert found.loc[("greedy", 2), "p"] == pytest.approx(1 / 6)
    assert found.loc[("greedy", 2), "percentile"] == pytest.approx(100 * 5.5 / 6)
    assert found.loc[("greedy", 2), "chance"] == pytest.approx(0.6 + WORTH.sum() / 2)
    band = subset_band(removals).set_index("size")
    assert band.loc[2, "subsets"] == 6
    assert band.loc[2, "mean"] == pytest.approx(0.6 + WORTH.sum() / 2)


def test_one_permutation_for_all_runs_is_what_p_counts() -> None:
    """Two runs that keep different layers: by hand over all 24 relabellings."""
    removals = noise(1, tasks=1)
    paths = removal_paths(removals)
    found = better_than_chance(removals, paths).set_index(["rule", "size"]).loc[("greedy", 2)]
    scores = removals[removals["split"] == "test"].set_index(["key", "kept"])["score"]
    kept = {
        row.key: read_kept(row.kept)
        for row in paths[(paths["rule"] == "greedy") & (paths["size"] == 2)].itertuples()
    }
    means = [
        np.mean([scores[key, write_kept([relabel[layer] for layer in own])] for key, own in kept.items()])
        for relabel in itertools.permutations(range(LAYERS))
    ]
    observed = np.mean([scores[key, write_kept(own)] for key, own in kept.items()])
    assert found["p"] == pytest.approx(np.mean([mean >= observed - 1e-12 for mean in means]))
    assert found["chance"] == pytest.approx(np.mean(means))
    assert found["score"] == pytest.approx(observed)


def test_skill_is_found_and_chance_is_not_taken_for_it() -> None:
    """Pure noise, 40 stores of 3 tasks x 2 seeds, 5 layers: p of each rule at its level, 5 % + 2.5 standard errors.

    And the family of all rules and sizes, Holm-corrected: the same level for any false claim at all.
    """
    removals = table(planted, tasks=3)
    found = better_than_chance(removals, removal_paths(removals)).set_index(["rule", "size"])
    assert found.loc[("greedy", 2), "p"] == pytest.approx(1 / 6), (
        "all runs keep the same two of four: 1 of 6 subsets"
    )
    assert found.loc[("greedy", 2), "p"] == found.loc[("greedy", 2), "least_p"]
    assert found.loc[("first", 2), "p"] > 0.3

    claims, any_claim = [], []
    for start in range(40):
        removals = noise(start, tasks=3, layers=5)
        found = better_than_chance(removals, removal_paths(removals))
        claims.append(found.groupby("rule")["p"].apply(lambda p: (p <= 0.05).mean()))
        any_claim.append((found["p_holm"] <= 0.05).any())
    assert (np.mean(claims, axis=0) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 40)).all()
    assert np.mean(any_claim) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 40)


def test_per_task_groups() -> None:
    removals = table(planted, tasks=3)
    found = better_than_chance(removals, removal_paths(removals), by="task")
    assert found.groupby("task")["n_runs"].first().to_dict() == {f"task {t}": 2 for t in range(3)}


def test_with_random_subsets_only_they_are_the_pool() -> None:
    """12 layers: the path, and 30 random subsets of 8 that all runs share."""
    generator = np.random.default_rng(0)
    worth = np.arange(12) / 100
    drawn = {tuple(sorted(generator.choice(12, 8, replace=False).tolist())) for _ in range(30)}
    path = [tuple(range(gone, 12)) for gone in range(13)]
    steps = {tuple(la for la in kept if la != out) for kept in path for out in kept}
    rows = [
        (f"k{seed}", "t", seed, write_kept(kept), split, 0.5 + worth[list(kept)].sum(), kind)
        for seed in (0, 1)
        for split in ("validation", "test")
        for kept, kind in (dict.fromkeys({*path, *steps}, "rule") | dict.fromkeys(drawn, "random")).items()
    ]
    removals = pd.DataFrame(rows, columns=["key", "task", "seed", "kept", "split", "score", "drawn"])
    paths = greedy_elimination(removals)
    assert paths[paths["size"] == 8]["kept"].unique().tolist() == ["4,5,6,7,8,9,10,11"]
    found = better_than_chance(removals, paths)
    assert found[["rule", "size"]].values.tolist() == [["greedy", 8]], "no other size has a pool"
    assert found["p"].iloc[0] == pytest.approx(1 / (1 + len(drawn)))
    assert set(against_chance(removals, paths)["size"]) == {8}
    assert set(subset_band(removals)["size"]) == {8}


# the smallest set --------------------------------------------------------------------------------------------------


def test_the_smallest_set_is_found_and_confirmed() -> None:
    removals = by_rows(lambda kept: 0.9 - 0.3 * (1 not in kept) - 0.2 * (3 not in kept))
    row = smallest_set(removals, removal_paths(removals), margin=0.03).iloc[0]
    assert row["size"] == 2
    assert row["kept"] == "0: 1,3; 1: 1,3; 2: 1,3"
    assert row["confirmed"]
    assert (row["measure"], row["n_seeds"], row["n_held_out"], row["n_test"]) == ("accuracy", 3, 600, 200)
    assert row["test_score"] == pytest.approx(row["test_full"])
    share = kept_share(greedy_elimination(removals), 2).set_index("layer")["share"]
    assert share.tolist() == [0, 1, 0, 1]


def test_a_wider_margin_lets_more_go_and_every_layer_counts_without_one() -> None:
    removals = by_rows(lambda kept: 0.9 - 0.05 * (LAYERS - len(kept)), rows=800)
    paths = removal_paths(removals)
    sizes = [
        smallest_set(removals, paths, margin=margin)["size"].iloc[0] for margin in (0.02, 0.08, 0.14, 0.5)
    ]
    assert sizes == [4, 3, 2, 0]


def test_false_claims_of_being_within_the_margin() -> None:
    """Removing any layer costs the margin in truth, on rows of their own: false claims on test rows at most 5 % + 2.5
    SE.

    40 stores; rows differ between subsets as independent draws, so the difference has all the noise it can have.
    """
    claims = []
    for start in range(40):
        generator = np.random.default_rng(start)
        removals = table(planted, tasks=1, seeds=3)
        wanted = [0.85 - 0.1 * (len(read_kept(kept)) < LAYERS) for kept in removals["kept"]]
        right = [generator.random(120) < rate for rate in wanted]
        removals = removals.assign(n=120, correct=[np.packbits(own).tobytes().hex() for own in right])
        paths = removal_paths(removals)[lambda t: t["rule"] == "first"]
        claims.append(
            smallest_set(removals, paths, rule="first", margin=0.1, draws=150)["size"].iloc[0] < LAYERS
        )
    assert np.mean(claims) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 40)


def test_regression_tests_the_score_over_seeds() -> None:
    generator = np.random.default_rng(0)
    removals = table(
        lambda t, s, split, kept: 0.7 - 0.2 * (1 not in kept) + generator.normal(0, 0.002), tasks=1, seeds=4
    )
    row = smallest_set(removals.assign(n=50, correct=None), removal_paths(removals), margin=0.05).iloc[0]
    assert (row["size"], row["measure"], row["confirmed"]) == (1, "score", True)


def test_rank_agreement_of_equal_and_of_random_orders() -> None:
    paths = removal_paths(table(planted, tasks=5))
    found = rank_agreement(paths).set_index("rule")
    assert found.index.tolist() == ["greedy", "consensus"]
    assert found.loc["greedy", "w"] == pytest.approx(1.0)
    assert found.loc["greedy", "order"] == "0,2,3,1"
    assert found.loc["greedy", "p"] == pytest.approx(stats.chi2.sf(5 * 3, 3))
    noisy = removal_paths(noise(3, tasks=8))
    found = rank_agreement(noisy).set_index("rule")
    assert found.loc["greedy", "p"] > 0.05
    assert found.loc["greedy", "w"] < 0.5
    assert (found.loc["greedy", "n_tasks"], found.loc["greedy", "n_runs"]) == (8, 16)


def test_what_cannot_be_read() -> None:
    removals = table(planted)
    with pytest.raises(DataError, match="more than one row"):
        leave_one_out(pd.concat([removals, removals]))
    deeper = table(planted_flat, tasks=1, seeds=1, layers=5).assign(key="deep")
    with pytest.raises(DataError, match="one depth"):
        leave_one_out(pd.concat([removals, deeper]))
    with pytest.raises(DataError, match="greedy path"):
        greedy_elimination(removals[removals["kept"] != "1,2,3"])
    with pytest.raises(ArgumentError, match="no column 'kept'"):
        leave_one_out(removals.drop(columns="kept"))


def planted_flat(*_: object) -> float:
    return 0.5
