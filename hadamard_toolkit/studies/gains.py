"""What one method scores above another on the same tasks and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies.statistics import mean_over


def gains(
    scores: pd.DataFrame | Mapping[str, pd.DataFrame],
    comparisons: Mapping[str, tuple[str, str]],
    *,
    over: str = "task",
    by: str | Sequence[str] = (),
    column: str = "method",
    on: Sequence[str] = ("task", "seed"),
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean paired difference of each comparison, first less second, with its t interval.

        gains(scores, {"over the head alone": ("Hadamard", "HeadOnly")})

    `comparisons` names pairs of values of `column`. Scores are paired where all columns of `on` agree; a run without a
    partner is left out. The differences go to `mean_over`, which averages within each unit of `over` first and gives
    the interval for other units of its kind: other tasks, or with `over="seed"` other seeds of these tasks. `by`, which
    must be among `on`, gives one mean for each of its values. Several readings of the same runs (with and without
    those that failed, say) go in as a mapping from the name of a reading to its rows.

    Columns: `reading` (of a mapping), `comparison`, those of `by`, `over`, `mean`, `low`, `high`, `level`, `n` (units),
    `averaged` (pairs), in units of the score. A comparison without a single pair has no row. Raises `DataError` where a
    value of `column` has two scores for one pair, and where a column `metric` says that scores without a common unit
    would be averaged.
    """
    groups = [by] if isinstance(by, str) else list(by)
    front = ["reading", "comparison"] if isinstance(scores, Mapping) else ["comparison"]
    readings = scores if isinstance(scores, Mapping) else {"": scores}
    parts = []
    for reading, rows in readings.items():
        for name, pairs in paired(rows, comparisons, column, on).items():
            means = mean_over(pairs, "gain", over=over, by=by, level=level)
            parts.append(means.assign(reading=reading, comparison=name))
    columns = [*front, *groups, "over", "mean", "low", "high", "level", "n", "averaged"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def paired(
    scores: pd.DataFrame, comparisons: Mapping[str, tuple[str, str]], column: str, on: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """The differences of each comparison that has any, in the column `gain`."""
    keys = [*on, *(["metric"] if "metric" in scores.columns and "metric" not in on else [])]
    twice = scores.duplicated([*keys, column])
    if twice.any():
        row = scores.loc[twice, [*keys, column]].iloc[0].to_dict()
        raise DataError(f"scores has more than one row for {row}; one row per run is compared")
    wide = scores.pivot(index=keys, columns=column, values="score")
    found = {}
    for name, both in comparisons.items():
        if set(both) <= set(wide.columns):
            pairs = pd.DataFrame({"gain": wide[both[0]] - wide[both[1]]}).dropna().reset_index()
            if len(pairs):
                found[name] = pairs
    return found
