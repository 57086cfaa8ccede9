"""What pruning an adapter at initialisation costs, and whether the choice of the weights matters."""

from __future__ import annotations

import pandas as pd

from hadamard_toolkit.errors import check_choice
from hadamard_toolkit.studies.gains import gains

UNPRUNED, SMALL = "unpruned", "small dense adapter"


def pruning_cost(sparse: pd.DataFrame) -> pd.DataFrame:
    """What pruning costs each pruned run of a `sparse_table`: `unpruned` and `cost`, its score less that one.

    `unpruned` is the score of the same adapter, task and seed at sparsity 0; runs without one are left out, and so are
    the small dense adapters (control `"dense"`).
    """
    same = ["adapter", "task", "seed"]
    own = sparse[sparse["control"] != "dense"]
    whole = own[own["sparsity"] == 0].set_index(same)["score"]
    table = own[own["sparsity"] > 0].join(whole.rename(UNPRUNED), on=same).dropna(subset=UNPRUNED)
    return table.assign(cost=table["score"] - table[UNPRUNED])


def pruning_gains(sparse: pd.DataFrame, sparsity: float, *, over: str = "seed") -> pd.DataFrame:
    """The differences that claims about pruning rest on, at one sparsity, by `gains`: paired by task and seed.

    Rows of `comparison`: each scorer less `"unpruned"` (does pruning cost anything?); each scorer less `"its masks
    shuffled"` and its other controls (does it matter which weights stay?); each scorer less `"small dense adapter"`,
    where that was run. `sparse` is a `sparse_table` of one adapter.
    """
    check_choice("sparsity", sparsity, sorted(set(sparse["sparsity"]) - {0.0}))
    small = sparse["control"] == "dense"
    chosen = sparse[(sparse["sparsity"] == sparsity) | (sparse["sparsity"] == 0) | small]
    condition = chosen["scorer"].where(
        chosen["control"] == "none", chosen["scorer"] + "|" + chosen["control"]
    )
    condition = condition.mask(chosen["sparsity"] == 0, UNPRUNED).mask(chosen["control"] == "dense", SMALL)
    pairs = {}
    for name in dict.fromkeys(condition):
        scorer, bar, control = name.partition("|")
        if bar:
            pairs[f"{scorer} − its masks {control}"] = (scorer, name)
        elif scorer not in (UNPRUNED, SMALL):
            pairs[f"{scorer} − {UNPRUNED}"] = (scorer, UNPRUNED)
            pairs[f"{scorer} − {SMALL}"] = (scorer, SMALL)
    return gains(chosen.assign(condition=condition), pairs, column="condition", over=over)
