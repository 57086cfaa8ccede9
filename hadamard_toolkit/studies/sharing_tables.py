"""The sharing study as tables to show: what a scheme is, and what is left of the score under it."""

from __future__ import annotations

import pandas as pd

from hadamard_toolkit.studies.sharing import BARE, OWN, PARTS

SHOWN = ["percent", "score", "share", "gain", "p_holm"]


def scheme_table(table: pd.DataFrame) -> pd.DataFrame:
    """Where each scheme takes W, b and the norm from, and what a task costs under it: one row per scheme.

    `table` is `measured_table(store, "sharing")`. Columns: `weight`, `bias`, `norm`, and as text `parameters` and
    `percent` (of the backbone).
    """
    schemes = table.drop_duplicates("scheme").set_index("scheme")[[*PARTS, "parameters", "percent"]]
    return schemes.assign(
        parameters=schemes["parameters"].map("{:,.0f}".format),
        percent=schemes["percent"].map("{:.4f}".format),
    )


def share_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`sharing_summary` as text: `percent` of the backbone, `score`, `share` and `gain` with intervals, `p_holm`.

    `gain` is the share of what is above the floor. An interval that does not exist (so few tasks bound it on no side)
    is written as `[none]`.
    """
    shown = summary.assign(
        percent=summary["percent"].map("{:.4f}".format),
        score=summary["score"].map("{:.3f}".format),
        share=_with_interval(summary, "share", 3),
        gain=_with_interval(summary, "gain_share", 2),
        p_holm=summary["p_holm"].map("{:.3f}".format).replace("nan", ""),
    )
    return shown[SHOWN]


def with_alone(table: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """A table of a smaller pool of tasks, with the schemes that need no other task (`"own"`, `"bare"`) added.

    Both are tables of `measured_table`; the rows added are those of the runs of `table`.
    """
    alone = measured[measured["key"].isin(table["key"]) & measured["scheme"].isin([OWN, BARE])]
    return pd.concat([table, alone], ignore_index=True)


def _with_interval(summary: pd.DataFrame, name: str, digits: int) -> list[str]:
    columns = summary[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None)
    texts = [f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for value, low, high in columns]
    return [text.replace("[nan, nan]", "[none]") for text in texts]
