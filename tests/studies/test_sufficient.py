"""The smallest set is found, chosen on held-out rows alone, and no row judges what it chose."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies.layer_ablation import (
    greedy_elimination,
    read_correct,
    read_kept,
    removal_paths,
)
from hadamard_toolkit.studies.statistics import hierarchical_bootstrap
from hadamard_toolkit.studies.sufficient import kept_share, smallest_set
from tests.studies.removals import LAYERS, by_rows, planted, table


def test_the_smallest_set_is_found_and_confirmed() -> None:
    removals = by_rows(lambda kept: 0.9 - 0.3 * (1 not in kept) - 0.2 * (3 not in kept))
    row = smallest_set(removals, removal_paths(removals), margin=0.03).iloc[0]
    assert row["size"] == 2
    assert row["kept"] == "0: 1,3; 1: 1,3; 2: 1,3"
    assert row["confirmed"]
    assert (row["measure"], row["n_seeds"], row["n_held_out"], row["n_test"]) == ("accuracy", 3, 600, 200)
    assert row["test_score"] == pytest.approx(row["test_full"])
    share = kept_share(greedy_elimination(removals), 2).set_index("layer")
    assert share["share"].tolist() == [0, 1, 0, 1]
    assert share[["size", "n_runs"]].drop_duplicates().values.tolist() == [[2, 3]]
    told = kept_share(greedy_elimination(removals), smallest_set(removals, removal_paths(removals)))
    assert told["confirmed"].all()
    assert told["share"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("lost", "rule", "verdict"),
    [
        ((0.3, 0.2), "greedy", "enough"),
        ((0.3, 0.2), "first", "all layers stay"),
        ((0.0, 0.0), "greedy", "nothing learned"),
        ((0.0, 0.02), "last", "nothing learned"),
    ],
)
def test_where_all_layers_are_worth_nothing_no_set_is_called_enough(
    lost: tuple[float, float], rule: str, verdict: str
) -> None:
    removals = by_rows(lambda kept: 0.9 - lost[0] * (0 not in kept) - lost[1] * (3 not in kept))
    paths = removal_paths(removals)
    row = smallest_set(removals, paths, margin=0.03, rule=rule)
    test = removals[removals["split"] == "test"].groupby("kept")["score"].mean()
    assert row["worth"].tolist() == pytest.approx([test["0,1,2,3"] - test[""]])
    assert row["verdict"].tolist() == [verdict]
    shown = kept_share(paths[paths["rule"] == rule], row)
    assert set(shown["confirmed"]) == {verdict == "enough"}


def test_a_smaller_set_that_test_rows_do_not_bear_out_is_not_confirmed() -> None:
    removals = by_rows(lambda kept: 0.9 - 0.3 * (1 not in kept))
    worse = (removals["split"] == "test") & ~removals["kept"].str.contains("0")
    removals.loc[worse, "correct"] = removals.loc[worse, "correct"].str.replace("f", "0")
    row = smallest_set(removals, removal_paths(removals), margin=0.03, rule="first").iloc[0]
    assert row["size"] < LAYERS
    assert not row["confirmed"]
    assert row["verdict"] == "not confirmed"


@pytest.mark.parametrize("rule", ["first", "last"])
def test_bounds_are_one_sided_and_test_rows_are_shared_by_seeds(rule: str) -> None:
    removals = by_rows(lambda kept: 0.9 - 0.01 * (LAYERS - len(kept)))
    paths = removal_paths(removals)
    row = smallest_set(removals, paths, rule=rule, margin=0.2, alpha=0.1, draws=400, seed=5).iloc[0]
    assert row["size"] == 0
    for split, examples, column in (("validation", "own", "held_out"), ("test", "shared", "test")):
        own = removals[removals["split"] == split].set_index(["kept", "seed"]).sort_index()
        right = [
            [read_correct(own.loc[(kept, s), "correct"], 200) for s in range(3)] for kept in ("", "0,1,2,3")
        ]
        found = hierarchical_bootstrap(*right, examples=examples, draws=400, level=0.8, seed=5).iloc[0]
        assert row[column] == pytest.approx(found["estimate"])
        assert row[f"{column}_low"] == pytest.approx(found["low"])
        assert row[f"{column}_low"] < row[column]


def test_no_row_judges_the_path_that_it_chose() -> None:
    """Each half of the rows likes another layer to go, by chance alone: what one gains, the other loses."""
    removals = by_rows(lambda kept: 0.8, tasks=1, seeds=1, rows=100)
    own = np.zeros(100, dtype=bool)
    own[np.random.default_rng([0, 0, 100]).permutation(100)[:50]] = True
    full = np.arange(100) % 10 > 1
    right = {
        "0,1,2": np.where(own, True, full & (np.arange(100) % 5 > 0)),
        "1,2,3": np.where(own, full & False, True),
    }
    held_out = removals["split"] == "validation"
    for kept in removals["kept"].unique():
        rows = right.get(kept, full if len(read_kept(kept)) == LAYERS else full & False)
        at = held_out & (removals["kept"] == kept)
        removals.loc[at, "correct"] = np.packbits(rows).tobytes().hex()
        removals.loc[at, "score"] = rows.mean()
    row = smallest_set(removals, removal_paths(removals), margin=0.05).iloc[0]
    assert (row["size"], row["ended"], row["confirmed"]) == (LAYERS, "bound", False)


def test_where_a_half_would_keep_what_was_not_scored_the_walk_ends() -> None:
    removals = by_rows(lambda kept: 0.8, tasks=1, seeds=2)
    paths = removal_paths(removals)
    stays = (removals["split"] == "test") | removals["kept"].map(len).isin([7, 5])
    row = smallest_set(removals[stays], paths, margin=0.05).iloc[0]
    assert (row["size"], row["ended"]) == (3, "not scored")


def test_a_rule_that_saw_the_held_out_rows_is_refused() -> None:
    removals = by_rows(lambda kept: 0.8, tasks=1)
    paths = removal_paths(removals)
    seen = paths[paths["rule"] == "greedy"].assign(rule="taylor")
    with pytest.raises(
        ArgumentError, match="rule='taylor' is not allowed: its scores come from the held-out"
    ):
        smallest_set(removals, pd.concat([paths, seen]), rule="taylor")


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


def test_shares_of_several_rules_at_once_are_refused() -> None:
    paths = removal_paths(by_rows(lambda kept: 0.8, tasks=1))
    with pytest.raises(ArgumentError, match=r"paths holds rules .*; give one of them"):
        kept_share(paths, 2)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_subset_without_a_score_ends_the_walk(runs: int) -> None:
    """Whether the score of one run is missing, or that of all."""
    removals = by_rows(lambda kept: 0.8, seeds=2)
    paths = removal_paths(removals)
    two_left = removals["kept"].map(lambda text: len(read_kept(text))) == 2
    seeds = sorted(removals["seed"].unique())[:runs]
    removals.loc[two_left & removals["seed"].isin(seeds), "score"] = np.nan
    row = smallest_set(removals, paths, rule="first", margin=0.05).iloc[0]
    assert (row["size"], row["ended"]) == (3, "not scored")
