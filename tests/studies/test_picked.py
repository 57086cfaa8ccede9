from __future__ import annotations

import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.studies import paper_claims, picked_rates, picked_runs
from hadamard_toolkit.studies.claims import NONE
from hadamard_toolkit.studies.paper_claims import _of_removal
from hadamard_toolkit.studies.picked import most_seeds


def runs(*rows: tuple[str, str, int, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["task", "protocol", "seed", "held_out"])


def test_the_protocol_with_most_seeds_counts_and_among_equals_the_better_one_on_held_out_rows() -> None:
    table = runs(
        ("a", "slow", 0, 0.9), ("a", "fast", 0, 0.5), ("a", "fast", 1, 0.5),
        ("b", "slow", 0, 0.6), ("b", "fast", 0, 0.7),
    )  # fmt: skip
    picked = most_seeds(table, ["task"])
    assert picked[["task", "protocol", "seed"]].values.tolist() == [
        ["a", "fast", 0], ["a", "fast", 1], ["b", "fast", 0],
    ]  # fmt: skip
    assert most_seeds(table.head(0), ["task"]).empty


def test_no_rate_of_the_fair_comparison_lies_at_an_edge() -> None:
    fair = ht.reference("fair", own=False)
    rates = picked_rates(fair)
    assert len(rates) == 8 * 6
    assert (rates["seeds"] == 5).all()
    assert (rates["tried"] >= 5).all()
    assert not rates["edge"].any()
    picked = picked_runs(fair)
    assert len(picked) == 8 * 6 * 5
    assert picked.groupby(["task", "label"])["rate"].nunique().max() == 1
    row = picked.iloc[0]
    record = fair.run(row["key"])
    assert row["score"] == record.metrics["test"][row["metric"]]
    assert row["held_out"] == record.metrics["validation"][row["metric"]]


def test_an_edge_is_the_least_or_the_greatest_rate() -> None:
    edges = picked_rates(ht.reference("wide", own=False)).set_index(["task", "label"])
    row = edges.loc[("stsb", "HeadOnly()")]
    assert (row["rate"], row["highest"], row["edge"]) == (0.3, 0.3, True)
    assert (edges["edge"] == edges["rate"].isin([0.3]) | (edges["rate"] == edges["lowest"])).all()


def test_a_set_of_layers_is_chosen_on_held_out_rows_and_judged_on_test_rows() -> None:
    def row(label: str, seed: int, score: float, held_out: float, protocol: str = "p") -> dict[str, object]:
        return {
            "task": "a",
            "label": label,
            "seed": seed,
            "score": score,
            "held_out": held_out,
            "protocol": protocol,
        }

    whole = pd.DataFrame(
        [row("Hadamard()", seed, 0.8, 0.0) for seed in (0, 1)] + [row("LoRA()", 0, 0.1, 0.9)]
    )
    kept = [row("x", 0, 0.7, 0.6), row("x", 1, 0.7, 0.6), row("y", 0, 0.79, 0.5), row("y", 1, 0.79, 0.6)]
    removal = pd.DataFrame([*kept, row("z", 0, 0.99, 0.99, "another rate")])
    every, chosen = _of_removal(removal, whole)
    assert every.differences["gain"].tolist() == pytest.approx([-0.1, -0.1, -0.01, -0.01])
    assert chosen.differences["label"].tolist() == ["x", "x"], "held-out rows choose, not test rows"
    assert "mean of 2 sets" in every.compared
    assert all(claim.differences.empty for claim in _of_removal(removal.head(0), whole))


def test_without_runs_every_claim_but_the_counted_ones_says_so() -> None:
    table = paper_claims(ht.reference("zoo", own=False), {})
    estimated = table[table["side"] != "counted"]
    assert set(estimated["verdict"]) == {NONE}
    assert len(estimated) > 20
    assert table[table["side"] == "counted"]["verdict"].tolist() == ["holds here"] * 2
    assert table["compared"].tolist()[-2:] == ["36,864 of 109,482,240", "24,576 of 109,482,240"]
