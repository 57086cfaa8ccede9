"""How many numbers a task needs: what k trained coefficients bring, one line per kind of directions."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from hadamard_toolkit.plotting.panels import DASHED, DOTTED, check_one_row, counted, legend_handles, require
from hadamard_toolkit.plotting.style import FAINT, INK, frame, looks, new_figure, style
from hadamard_toolkit.studies.how_many import HEAD, UNSHARED

HEIGHT = 2.1  # inches
NAMES = {"gap": "Share of the adapter's gain", "score": "Share of the adapter's score"}


def coefficient_curves(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """The share of what the whole adapter brings against the number k of coefficients, a line per kind of basis.

    `table` is that of `studies.numbers_needed`. Bands are intervals for other tasks, where they exist. The solid line
    at 1 is the unshared adapter, the dashed one the head alone, the dotted one the margin. A filled mark is a k that is
    enough.
    """
    columns = ("share", "low", "high", "margin")
    table = require(table, "kind", "k", "verdict", "n", "left_out", "of", *columns, numbers=("k", "share"))
    check_one_row(table, "kind", "k", hint="one row per kind and k is drawn")
    head, rows = table[table["kind"] == HEAD], table[table["kind"] != HEAD]
    drawn = looks(rows["kind"])
    with style():
        figure = new_figure(venue)
        axis = figure.subplots()
        for kind, part in rows.groupby("kind", sort=False):
            look, part = drawn[kind], part.sort_values("k")
            axis.plot(part["k"], part["share"], color=look.colour, linestyle=look.line)
            for enough, face in ((True, look.colour), (False, "white")):
                marked = part[(part["verdict"] == "enough") == enough]
                axis.plot(
                    marked["k"],
                    marked["share"],
                    look.marker,
                    color=look.colour,
                    markerfacecolor=face,
                    zorder=4,
                )
            if part["low"].isna().any():
                continue
            if len(part) == 1:
                axis.vlines(part["k"], part["low"], part["high"], color=look.colour, linewidth=0.8)
            else:
                axis.fill_between(
                    part["k"], part["low"], part["high"], color=look.colour, alpha=0.12, linewidth=0
                )
        axis.axhline(1, color=INK, linewidth=0.8)
        axis.axhline(table["margin"].iloc[0], color=INK, linewidth=0.8, linestyle=DOTTED)
        for share in head["share"]:
            axis.axhline(share, color=FAINT, linewidth=0.8, linestyle=DASHED)
        axis.set_xscale("log", base=2)
        ks = sorted(set(rows["k"]))
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_xlabel("Trained coefficients per task, k")
        axis.set_ylabel(NAMES[table["of"].iloc[0]])
        note = (
            f"{counted(rows['n'], 'task')}, {table['left_out'].iloc[0]} left out where the adapter brings no more than "
            f"noise; bands: 95 % intervals for other tasks. Solid line: {UNSHARED}, dashed: {HEAD}, dotted: the goal "
            f"of {100 * table['margin'].iloc[0]:g} %. Filled marks: shown to be enough."
        )
        frame(figure, HEIGHT, handles=legend_handles(drawn), note=note)
    return figure
