"""Choices better than chance are found, noise is not taken for skill, and no test claims what it cannot show."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.layer_ablation import (
    greedy_elimination,
    read_kept,
    removal_paths,
    subset_band,
    write_kept,
)
from hadamard_toolkit.studies.layer_ablation_tests import (
    against_chance,
    better_than_chance,
    rank_agreement,
)
from hadamard_toolkit.studies.statistics import holm
from tests.studies.removals import LAYERS, WORTH, by_rows, noise, planted, table


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
    found = better_than_chance(removals, paths, test="relabelling", alpha=0.9)
    found = found.set_index(["rule", "size"]).loc[("greedy", 2)]
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
    found = better_than_chance(removals, removal_paths(removals), test="relabelling")
    found = found.set_index(["rule", "size"])
    assert found.loc[("greedy", 2), "least_p"] == pytest.approx(1 / 6), (
        "all runs keep the same two of four: 1 of 6 subsets"
    )
    assert np.isnan(found.loc[("greedy", 2), "p"])
    assert "never be significant: least p 0.167" in found.loc[("greedy", 2), "refused"]

    claims, any_claim = [], []
    for start in range(40):
        removals = noise(start, tasks=3, layers=5)
        found = better_than_chance(removals, removal_paths(removals), test="relabelling")
        claims.append(found.groupby("rule")["p"].apply(lambda p: (p <= 0.05).mean()))
        any_claim.append((found["p_holm"] <= 0.05).any())
    assert (np.mean(claims, axis=0) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 40)).all()
    assert np.mean(any_claim) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 40)


def test_per_task_groups() -> None:
    removals = table(planted, tasks=3)
    found = better_than_chance(removals, removal_paths(removals), by="task")
    assert found.groupby("task")["n_runs"].first().to_dict() == {f"task {t}": 2 for t in range(3)}
    assert set(found["test"]) == {"relabelling"}, "one task says nothing of other tasks"
    with pytest.raises(ArgumentError, match="test='tasks' is not allowed"):
        better_than_chance(removals, removal_paths(removals), by="task", test="tasks")


def test_over_tasks_the_choice_is_compared_with_the_mean_of_all_subsets_of_its_size() -> None:
    removals = noise(4, tasks=4)
    paths = removal_paths(removals)
    found = better_than_chance(removals, paths, test="tasks").set_index(["rule", "size"])
    curves = against_chance(removals, paths).query("rule == 'greedy' and size == 3")
    gains = (curves["score"] - curves["chance"]).groupby(curves["task"]).mean()
    expected = stats.ttest_1samp(gains, 0, alternative="greater")
    row = found.loc[("greedy", 3)]
    assert (row["gain"], row["p"]) == pytest.approx((gains.mean(), expected.pvalue))
    assert row["chance"] == pytest.approx(curves.groupby("task")["chance"].mean().mean())
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])


def test_each_question_is_a_family_of_its_own() -> None:
    removals = noise(5, tasks=4)
    found = better_than_chance(removals, removal_paths(removals))
    rules = found[found["test"] == "tasks"].groupby("question")["rule"].unique()
    common, own = sorted(rules, key=len, reverse=True)
    assert set(own) == {"greedy"}
    assert set(common) == {"consensus", "first", "last"}, "one subset for all tasks, whoever chose it"
    for _, family in found.groupby("question"):
        made = family[family["refused"] == ""]
        assert made["p_holm"].tolist() == pytest.approx(holm(made["p"]).tolist())
        assert family.loc[family["refused"] != "", ["p", "p_holm"]].isna().all(axis=None)


def test_tests_that_cannot_reject_are_refused_and_fewer_questions_are_the_way_out() -> None:
    """20 drawn subsets: least p 1/21. Alone it may speak; eight of them together could never be significant."""
    generator = np.random.default_rng(2)
    drawn = {
        tuple(sorted(generator.choice(10, size, replace=False).tolist()))
        for size in (5, 6)
        for _ in range(90)
    }
    pool = [kept for size in (5, 6) for kept in [own for own in drawn if len(own) == size][:20]]
    ends = [
        tuple(range(10)),
        *(tuple(range(gone, 10)) for gone in (4, 5)),
        *(tuple(range(keep)) for keep in (5, 6)),
    ]
    rows = [
        (f"k{task}", f"t{task}", 0, write_kept(kept), "test", generator.random(), kind)
        for task in range(3)
        for kept, kind in (dict.fromkeys(pool, "random") | dict.fromkeys(ends, "rule")).items()
    ]
    removals = pd.DataFrame(rows, columns=["key", "task", "seed", "kept", "split", "score", "drawn"])
    rules = {"up": {5: "5,6,7,8,9", 6: "4,5,6,7,8,9"}, "down": {5: "0,1,2,3,4", 6: "0,1,2,3,4,5"}}
    paths = pd.DataFrame(
        [
            (f"k{task}", rule, size, kept)
            for task in range(3)
            for rule in rules
            for size, kept in rules[rule].items()
        ],
        columns=["key", "rule", "size", "kept"],
    )
    every = better_than_chance(removals, paths, test="relabelling")
    assert every["p"].isna().all()
    assert every["refused"].str.contains(r"least p 0.0(?:48|50)").all()
    one = better_than_chance(removals, paths.query("rule == 'up' and size == 6"), test="relabelling")
    assert one["refused"].tolist() == [""]
    assert one["p"].between(1 / 21, 1).all()
    alone = better_than_chance(removals[removals["key"] == "k0"], paths.query("key == 'k0'"), test="tasks")
    assert (alone["refused"] != "").all(), "one task"


def test_accuracy_and_correlation_are_not_averaged() -> None:
    removals = by_rows(lambda kept: 0.6 + WORTH[list(kept)].sum(), tasks=2)
    paths = removal_paths(removals)
    mixed = removals.assign(correct=removals["correct"].where(removals["task"] == "task 0"))
    with pytest.raises(DataError, match="task 1 by a correlation"):
        better_than_chance(mixed, paths)
    assert len(better_than_chance(mixed, paths, by="task"))
    metric = removals["task"].map({"task 0": "accuracy", "task 1": "spearman"})
    with pytest.raises(DataError, match="no common unit"):
        better_than_chance(removals.assign(metric=metric), paths)


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
    found = better_than_chance(removals, paths, test="relabelling")
    assert found[["rule", "size"]].values.tolist() == [["greedy", 8]], "no other size has a pool"
    assert found["p"].iloc[0] == pytest.approx(1 / (1 + len(drawn)))
    alone = against_chance(removals, paths)
    assert set(alone["size"]) == {8}
    assert set(alone["subsets"]) == {len(drawn)}
    assert alone["p"].to_numpy() == pytest.approx(1 / (1 + len(drawn))), (
        "itself among those it is compared with"
    )
    assert set(alone["percentile"]) == {100}
    assert set(subset_band(removals)["size"]) == {8}


def test_rank_agreement_of_equal_and_of_random_orders() -> None:
    paths = removal_paths(table(planted, tasks=5))
    found = rank_agreement(paths).set_index("rule")
    assert found.index.tolist() == ["greedy", "consensus"]
    assert np.isnan(found.loc["consensus", ["w", "p"]].astype(float)).all()
    assert "agree by construction" in found.loc["consensus", "refused"]
    with pytest.raises(ArgumentError, match="agree by construction"):
        rank_agreement(paths[paths["rule"].isin(["consensus", "first"])])
    assert found.loc["greedy", "w"] == pytest.approx(1.0)
    assert found.loc["greedy", "order"] == "0,2,3,1"
    assert found.loc["greedy", "p"] == pytest.approx(stats.chi2.sf(5 * 3, 3))
    noisy = removal_paths(noise(3, tasks=8))
    found = rank_agreement(noisy).set_index("rule")
    assert found.loc["greedy", "p"] > 0.05
    assert found.loc["greedy", "w"] < 0.5
    assert (found.loc["greedy", "n_tasks"], found.loc["greedy", "n_runs"]) == (8, 16)
