"""The tables behind what the pruner shows: scores, evidence, and both together for the figure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from hadamard_toolkit.widgets.evaluation import Evaluation
from hadamard_toolkit.widgets.pruning_state import LayerSite

_OF_FIGURE = ["task", "metric", "split", "value", "full", "difference", "low", "high", "n"]


def score_table(evaluations: Sequence[Evaluation], kept: Collection[LayerSite]) -> pd.DataFrame:
    """What is kept against the unpruned model, a row per task: the fields of `Score`, `difference` and `split`."""
    rows = []
    for evaluation in evaluations:
        score = evaluation.score(kept)
        named = {"task": evaluation.name, "split": evaluation.split}
        rows.append({**named, **vars(score), "difference": score.difference})
    return pd.DataFrame(rows)


def evidence_of_tasks(
    evaluations: Sequence[Evaluation], without: Mapping[int, Mapping[LayerSite, float]]
) -> pd.DataFrame:
    """`evidence.evidence_table` of every task, with `without`: what the score misses without a part, where known."""
    tables = []
    for index, evaluation in enumerate(evaluations):
        table, known = evaluation.evidence, without.get(index, {})
        places = zip(table["layer"], table["site"], strict=True)
        missed = [known.get(place, float("nan")) for place in places]
        tables.append(table.assign(task=evaluation.name, without=missed))
    return pd.concat(tables, ignore_index=True)


def figure_table(evidence: pd.DataFrame, scores: pd.DataFrame, kept: Collection[LayerSite]) -> pd.DataFrame:
    """The table of `plotting.pruned_layers`: a row per task, layer and site, with the scores of the task in each."""
    parts = evidence[["task", "layer", "site", "importance"]]
    places = zip(parts["layer"], parts["site"], strict=True)
    parts = parts.assign(kept=[place in kept for place in places])
    return parts.merge(scores[_OF_FIGURE], on="task", validate="many_to_one")
