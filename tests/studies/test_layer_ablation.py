"""Planted layers are found, and choices are made on held-out rows alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.studies.layer_ablation import (
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
from hadamard_toolkit.studies.layer_ablation_tests import against_chance, rank_agreement
from hadamard_toolkit.studies.sufficient import smallest_set
from tests.studies.removals import LAYERS, WORTH, by_rows, noise, planted, table

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


def test_equal_scores_go_by_loss() -> None:
    removals = table(lambda *_: 0.5)
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


def test_what_cannot_be_read() -> None:
    removals = table(planted)
    with pytest.raises(DataError, match="more than one row"):
        leave_one_out(pd.concat([removals, removals]))
    deeper = table(planted_flat, tasks=1, seeds=1, layers=5).assign(key="deep")
    with pytest.raises(DataError, match="one depth"):
        leave_one_out(pd.concat([removals, deeper]))
    with pytest.raises(DataError, match="greedy path"):
        greedy_elimination(removals[removals["kept"] != "1,2,3"])
    with pytest.raises(DataError, match="without the score of all 4 layers kept"):
        leave_one_out(removals[(removals["kept"] != "0,1,2,3") | (removals["seed"] > 0)])
    with pytest.raises(ArgumentError, match="no column 'kept'"):
        leave_one_out(removals.drop(columns="kept"))


def planted_flat(*_: object) -> float:
    return 0.5


def reversed_on_test(task: int, seed: int, split: str, kept: tuple[int, ...]) -> float:
    worth = WORTH if split == "validation" else WORTH[::-1]
    return float(0.6 + worth[list(kept)].sum() + 0.01 * (split == "test"))


def test_every_table_reads_the_split_that_it_is_asked_for() -> None:
    removals = table(reversed_on_test, tasks=1, seeds=1)
    paths = greedy_elimination(removals)
    for split, worth, full in (("validation", WORTH, 0.81), ("test", WORTH[::-1], 0.82)):
        drops = leave_one_out(removals, split=split)
        assert drops["drop"].to_numpy() == pytest.approx(worth)
        assert drops["full"].to_numpy() == pytest.approx(full)
        curve = removal_curves(removals, paths, split=split).set_index("size")
        assert curve.loc[2, "score"] == pytest.approx(full - worth[0] - worth[2])
        assert curve["full"].to_numpy() == pytest.approx(full)
        assert subset_band(removals, split=split).set_index("size").loc[4, "mean"] == pytest.approx(full)
        chance = against_chance(removals, paths, split=split).set_index("size")
        assert chance.loc[2, "chance"] == pytest.approx(full - WORTH.sum() / 2)
    pd.testing.assert_frame_equal(leave_one_out(removals), leave_one_out(removals, split="test"))


def test_the_band_holds_nine_tenths_of_the_subsets_each_the_mean_of_its_seeds() -> None:
    removals = noise(4, tasks=2, seeds=3, layers=6)
    band = subset_band(removals).set_index(["task", "size"])
    for task in ("task 0", "task 1"):
        own = removals[(removals["task"] == task) & (removals["split"] == "test")]
        of_size = own[[len(read_kept(kept)) == 3 for kept in own["kept"]]]
        means = of_size.groupby("kept")["score"].mean()
        row = band.loc[(task, 3)]
        assert row[["low", "middle", "high"]].tolist() == pytest.approx(
            means.quantile([0.05, 0.5, 0.95]).tolist()
        )
        assert row["mean"] == pytest.approx(means.mean())
        assert (row["subsets"], row["seeds"]) == (20, 3)


def test_equal_scores_are_no_order_that_runs_share() -> None:
    """The lower layer every time would be one: tasks in which nothing differs would agree perfectly."""
    flat = table(lambda *_: 0.8, tasks=40, seeds=1)
    paths = greedy_elimination(flat)
    first = paths[paths["size"] == LAYERS - 1]["removed"]
    assert set(first) == set(range(LAYERS))
    assert rank_agreement(paths)["p"].iloc[0] > 0.05
    pd.testing.assert_frame_equal(greedy_elimination(flat), paths)
