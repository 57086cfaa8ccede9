from __future__ import annotations

import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.studies import pruning_cost, pruning_gains

ROWS = [
    ("dense", 0.0, "none", 0, 0.90),
    ("dense", 0.0, "none", 1, 0.80),
    ("snip", 0.8, "none", 0, 0.88),
    ("snip", 0.8, "none", 1, 0.80),
    ("snip", 0.8, "shuffled", 0, 0.84),
    ("snip", 0.8, "shuffled", 1, 0.80),
    ("dense", 0.79, "dense", 0, 0.86),
    ("random", 0.4, "none", 0, 0.10),
    ("random", 0.8, "none", 2, 0.50),
]
SPARSE = pd.DataFrame(ROWS, columns=["scorer", "sparsity", "control", "seed", "score"]).assign(
    adapter="Pfeiffer()", task="t"
)


def test_the_cost_is_against_the_unpruned_run_of_the_same_seed() -> None:
    cost = pruning_cost(SPARSE)
    assert cost["cost"].tolist() == pytest.approx([-0.02, 0.0, -0.06, 0.0, -0.80])
    assert cost["unpruned"].tolist() == [0.9, 0.8, 0.9, 0.8, 0.9]
    assert 2 not in set(cost["seed"]), "no unpruned run"
    assert "dense" not in set(cost["control"])


def test_what_claims_about_pruning_rest_on() -> None:
    table = pruning_gains(SPARSE, 0.8).set_index("comparison")
    assert table["mean"].to_dict() == pytest.approx(
        {"snip − unpruned": -0.01, "snip − small dense adapter": 0.02, "snip − its masks shuffled": 0.02}
    )
    assert table["averaged"].to_dict() == {
        "snip − unpruned": 2,
        "snip − small dense adapter": 1,
        "snip − its masks shuffled": 2,
    }
    assert set(table["over"]) == {"seed"}
    assert pruning_gains(SPARSE, 0.4)["comparison"].tolist() == [
        "random − unpruned",
        "random − small dense adapter",
    ]
    with pytest.raises(ArgumentError, match=r"sparsity=0\.5"):
        pruning_gains(SPARSE, 0.5)
