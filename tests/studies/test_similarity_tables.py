"""The similarity study as tables: the runs that compare, one cell, and Mantel tests of a planted kinship."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies import (
    comparable_runs,
    contrast_table,
    interval_text,
    kinship_tests,
    mantel,
    one_cell,
    seed_effect,
    similarity_contrast,
    similarity_matrix,
    similarity_summary,
    vector_similarity,
)
from hadamard_toolkit.studies.similarity import ALL_LAYERS
from tests.studies.test_similarity import planted


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    return vector_similarity(planted(), permutations=49)


def test_runs_compare_that_differ_in_task_and_seed_alone(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store = ht.RunStore(tmp_path / "store")
    other = replace(make_spec().protocol, train_rows=32)
    kept = [make_spec(seed=seed) for seed in (0, 1)]
    ht.sweep([*kept, make_spec(protocol=other), make_spec(adapter=ht.HeadOnly())], store)
    found = comparable_runs(store)
    assert sorted(found["key"]) == sorted(spec.key for spec in kept)
    assert found["headline"].all()
    assert set(found["split"]) == {"test"}
    with pytest.raises(DataError, match="HeadOnly with two seeds"):
        comparable_runs(store, method="HeadOnly")


def test_one_cell_is_the_cosine_of_all_coordinates_over_all_layers(pairs: pd.DataFrame) -> None:
    found = one_cell(pairs)
    wanted = pairs.query(
        "measure == 'cosine' and removed == 0 and layer == @ALL_LAYERS", local_dict={"ALL_LAYERS": ALL_LAYERS}
    )
    pd.testing.assert_frame_equal(found, wanted.reset_index(drop=True))
    every = one_cell(pairs, layer=None, measure="spearman", removed=4)
    assert set(every["measure"]) == {"spearman"}
    assert set(every["removed"]) == {4}
    assert every["layer"].nunique() == 5


def test_the_contrast_as_text_holds_the_values_and_intervals(pairs: pd.DataFrame) -> None:
    contrast = similarity_contrast(similarity_summary(pairs))
    shown = contrast_table(contrast)
    assert list(shown.columns) == ["floor", "between", "within", "disattenuated"]
    assert shown.shape == (2 * 2 * 2, 4)
    row = one_cell(contrast).query("vector == 'bias' and quantity == 'within'").iloc[0]
    assert shown.loc[("b", "cosine", 0), "within"] == interval_text(
        row["value"], row["low"], row["high"], digits=2
    )


def kin(seed: int = 0) -> pd.DataFrame:
    """A summary of six tasks in two kinds, a to c and d to f, and one that is not like itself; W as b."""
    generator = np.random.default_rng(seed)
    rows = []
    for first, second in itertools.combinations_with_replacement("abcdefg", 2):
        alike = 0.8 if (first in "abc") == (second in "abc") else 0.2
        free = 1.0 if first == second else alike + generator.uniform(-0.1, 0.1)
        free = np.nan if "g" in (first, second) else free
        row = {"task_a": first, "task_b": second, "layer": ALL_LAYERS, "measure": "cosine", "removed": 0}
        rows += [{**row, "vector": vector, "disattenuated": free} for vector in ("weight", "bias")]
    return pd.DataFrame(rows)


def test_kinship_tests_are_those_of_mantel_without_the_unreliable() -> None:
    summary = kin()
    found = kinship_tests(summary, ["a", "b", "c", "g"])
    assert found[["first", "second"]].values.tolist() == [
        ["W − 1", "b"],
        ["W − 1", "both of the kind"],
        ["b", "both of the kind"],
    ]
    assert found.attrs["left_out"] == ["g"]
    assert found["tasks"].tolist() == [6, 6, 6]
    assert found["pairs"].tolist() == [15, 15, 15]
    assert found["value"].iloc[0] == pytest.approx(1)
    matrix = similarity_matrix(summary, vector="bias", value="disattenuated").loc[
        list("abcdef"), list("abcdef")
    ]
    both = [[float(r == c or {r, c} <= set("abc")) for c in "abcdef"] for r in "abcdef"]
    wanted = mantel(matrix, pd.DataFrame(both, list("abcdef"), list("abcdef"))).iloc[0]
    assert found[["value", "p", "p_floor"]].iloc[2].tolist() == wanted[["value", "p", "p_floor"]].tolist()


@pytest.mark.parametrize("kind", ["", "a", "abcdef"])
def test_a_kind_of_one_or_of_all_has_no_test(kind: str) -> None:
    assert len(kinship_tests(kin(), list(kind))) == 1


def test_pairs_are_told_apart_by_their_seeds() -> None:
    rows = [("x", "y", 0, 0, 0.4), ("x", "y", 0, 1, 0.1), ("x", "y", 1, 0, 0.3), ("x", "x", 0, 1, 0.9)]
    pairs = pd.DataFrame(rows, columns=["task_a", "task_b", "seed_a", "seed_b", "value"]).assign(
        vector="bias"
    )
    found = seed_effect(pairs)
    assert found.loc[("bias", "same seed"), ["mean", "count"]].tolist() == [0.4, 1]
    assert found.loc[("bias", "other seed"), ["mean", "count"]].tolist() == pytest.approx([0.2, 2])
