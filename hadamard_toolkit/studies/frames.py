"""What the studies ask of the tables they are given."""

from __future__ import annotations

import pandas as pd

from hadamard_toolkit.errors import ArgumentError


def require_columns(argument: str, table: pd.DataFrame, *columns: str) -> None:
    """Raise `ArgumentError` unless `table`, the argument of that name, has all `columns`."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ArgumentError(
            f"{argument} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, table.columns))}"
        )
