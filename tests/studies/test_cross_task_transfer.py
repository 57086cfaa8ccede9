"""Transplants as tables: gains are over the bare backbone with the same head, and told by whose vectors they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies import transfer_gains, transfer_table

COLUMNS = ["kind", "source_task", "norms", "head", "score", "metric", "n"]


def test_gains_are_over_the_bare_backbone_with_the_same_head(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store, spec = ht.RunStore(tmp_path / "store"), make_spec()
    ht.sweep([spec], store)
    rows = [
        ("none", None, "source", "own", 0.5, "accuracy", 40),
        ("none", None, "source", "retrained", 0.6, "accuracy", 40),
        ("own", "sst2", "source", "own", 0.9, "accuracy", 40),
        ("source", "embedded/tweets-polarity", "source", "retrained", 0.7, "accuracy", 40),
        ("source", "embedded/tweets-polarity", "target", "retrained", 0.1, "accuracy", 40),
    ]
    store.measured(spec.key, "transplant", lambda: pd.DataFrame(rows, columns=COLUMNS))
    found = transfer_table(store, [spec.key])
    assert found["gain"].tolist() == pytest.approx([0, 0, 0.4, 0.1])
    assert found["source"].tolist()[2:] == ["sst2", "tweets-polarity"]
    with pytest.raises(DataError, match="none of the 1 runs"):
        transfer_table(store, ["0" * 16])


def test_means_over_targets_are_told_by_whose_vectors_they_are() -> None:
    rows = [
        ("a", "own", "a", 0.10),
        ("b", "own", "b", 0.20),
        ("a", "source", "b", 0.06),
        ("b", "source", "a", 0.08),
        ("b", "source", "c", -0.02),
        ("a", "permuted", "b", -0.01),
        ("a", "permuted", "c", -0.03),
        ("a", "none", None, 0.0),
        ("c", "own", "c", 5.0),
    ]
    table = pd.DataFrame(rows, columns=["task", "kind", "source", "gain"]).assign(
        head="retrained", metric="accuracy"
    )
    ranked = table[table["task"] == "a"].assign(task="r", metric="spearman", source="a")
    everything = pd.concat([table, table.assign(head="own", gain=9.0), ranked])
    found = transfer_gains(everything, ["a", "b", "r"]).set_index(["vectors", "metric"])
    accuracy = found.xs("accuracy", level="metric")
    assert list(accuracy.index) == ["own", "the same kind", "another kind", "permuted"]
    assert accuracy["mean"].tolist() == pytest.approx([0.15, 0.07, -0.02, -0.02])
    assert accuracy["n"].tolist() == [2, 2, 1, 1]
    assert accuracy["averaged"].tolist() == [2, 2, 1, 2]
    assert accuracy["low"].isna().tolist() == [False, False, True, True]
    assert found.loc[("the same kind", "spearman"), "mean"] == pytest.approx(0.06)
    with_own_head = transfer_gains(everything, ["a", "b"], head="own")
    assert set(with_own_head["mean"]) == {9.0}
