"""Names and numbers as they are read: short task names, mean ± standard deviation, estimates with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import check_range

SUITE = "embedded/"
TASK_COLUMNS = ("task", "task_a", "task_b", "source_task")


def short_names(table: pd.DataFrame) -> pd.DataFrame:
    """The table with tasks of the embedded suite under their short names, such as `"tweets-polarity"`.

    Names are changed in the columns that hold tasks (`task`, `task_a`, `task_b`, `source_task`), in the index and in
    the column labels. A name that would be another task's in the same table stays as it is.
    """
    columns = [column for column in TASK_COLUMNS if column in table.columns]
    taken = {*table.index, *table.columns}.union(*(table[column] for column in columns))

    def short(name: Hashable) -> Hashable:
        shorter = name.removeprefix(SUITE) if isinstance(name, str) else name
        return name if shorter in taken else shorter

    changed = table.assign(**{column: table[column].map(short) for column in columns})
    return changed.rename(index=short, columns=short)


def in_order(table: pd.DataFrame, column: str, values: Iterable[Hashable]) -> pd.DataFrame:
    """The rows whose `column` is one of `values`, sorted as `values` are; rows of one value keep their order."""
    place = {value: number for number, value in enumerate(values)}
    chosen = table[table[column].isin(list(place))]
    return chosen.sort_values(column, key=lambda names: names.map(place).astype(int), kind="stable")


def mean_sd(
    table: pd.DataFrame, by: str | Sequence[str], value: str = "score", *, digits: int = 3, times: float = 1.0
) -> pd.Series:
    """Text for each group of `by`: `"0.912 ± 0.004 (3)"`, mean ± standard deviation over its rows and their number.

    One row has no spread: `"0.912 (1)"`. `times=100` gives points. Where the table has a column `failed` (of
    `mark_failed`), `" †2"` says that two of the runs have failed. Groups keep the order of the table.
    """
    check_range("digits", digits, least=0)
    groups = table.groupby([by] if isinstance(by, str) else list(by), sort=False, observed=True)
    cells = (times * groups[value].mean()).map(f"{{:.{digits}f}}".format)
    spread = (times * groups[value].std()).map(f" ± {{:.{digits}f}}".format)
    cells += spread.where(groups.size() > 1, "") + groups.size().map(" ({})".format)
    if "failed" in table.columns:
        failed = groups["failed"].sum()
        cells += failed.map(" †{}".format).where(failed > 0, "")
    return cells.rename(value)


def mean_sd_table(
    table: pd.DataFrame,
    rows: str | Sequence[str],
    columns: str,
    value: str = "score",
    *,
    digits: int = 3,
    times: float = 1.0,
    absent: str = "not run",
) -> pd.DataFrame:
    """`mean_sd` as a table to show: groups of `rows` down, values of `columns` across, in the order of `table`.

    A cell without any row of `table` says `absent`.
    """
    down = [rows] if isinstance(rows, str) else list(rows)
    cells = mean_sd(table, [*down, columns], value, digits=digits, times=times)
    return cells.unstack(columns, sort=False).fillna(absent)


def interval_text(
    value: float, low: float = np.nan, high: float = np.nan, *, digits: int = 1, times: float = 1.0
) -> str:
    """`"+1.1 [+0.1, +2.1]"`: a difference with its interval, or the difference alone where there is no interval.

    `times=100` turns a difference of accuracies into points.
    """
    shown = [f"{times * number:+.{digits}f}" for number in (value, low, high)]
    known = np.isfinite(low) and np.isfinite(high)
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if known else shown[0]


def intervals(table: pd.DataFrame, value: str = "mean", *, digits: int = 1, times: float = 1.0) -> pd.Series:
    """`interval_text` of every row, from the columns `value`, `low` and `high`."""
    columns = table[[value, "low", "high"]].itertuples(index=False, name=None)
    texts = [interval_text(*numbers, digits=digits, times=times) for numbers in columns]
    return pd.Series(texts, table.index, dtype=object)


def interval_table(
    table: pd.DataFrame,
    rows: str | Sequence[str],
    columns: str,
    value: str = "mean",
    *,
    digits: int = 1,
    times: float = 1.0,
    absent: str = "–",
) -> pd.DataFrame:
    """`intervals` as a table to show, in the order of `table`: `"+1.1 [+0.1, +2.1] (7)"`, with `n` in brackets.

    Without a column `n` there are no brackets. A cell without a row of `table` says `absent`.
    """
    down = [rows] if isinstance(rows, str) else list(rows)
    texts = intervals(table, value, digits=digits, times=times)
    if "n" in table.columns:
        texts += table["n"].map(" ({})".format)
    cells = table[[*down, columns]].assign(text=texts).set_index([*down, columns])["text"]
    return cells.unstack(columns, sort=False).fillna(absent)


def listed(names: Iterable[object], nothing: str = "none") -> str:
    """`"a, b and c"`, or `nothing` for an empty list."""
    *first, last = [str(name) for name in names] or [nothing]
    return f"{', '.join(first)} and {last}" if first else last


def as_text(table: pd.DataFrame, *, digits: int = 3) -> pd.DataFrame:
    """The table to show: whole numbers as `"36,864"`, others with `digits` decimals, missing ones empty."""
    check_range("digits", digits, least=0)

    def text(cell: object) -> object:
        if isinstance(cell, bool | np.bool_) or not isinstance(cell, int | float | np.number):
            return "" if cell is None else cell
        if isinstance(cell, int | np.integer):
            return f"{cell:,}"
        return "" if np.isnan(cell) else f"{cell:,.{digits}f}"

    # column by column: a row of mixed numbers would turn whole ones into floats
    return pd.DataFrame({name: table[name].map(text).astype(object) for name in table.columns})
