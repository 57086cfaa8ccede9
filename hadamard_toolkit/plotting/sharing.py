"""What sharing costs and what it saves: every scheme's parameters per task beside its share of the unshared score."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from hadamard_toolkit.errors import check_choice
from hadamard_toolkit.plotting.panels import DASHED, DOTTED, require
from hadamard_toolkit.plotting.style import FAINT, GRID, INK, frame, looks, new_figure, style
from hadamard_toolkit.studies.sharing import BARE, GOAL_PARAMETERS, GOAL_SHARE, OWN, UNSHARED

ROW = 0.17  # inches of a scheme
NAMES = {OWN: "Share of the score with own vectors", UNSHARED: "Share of the unshared score"}
CONTROLS = ("another task", "permuted", "no vectors, own norm", "no vectors, shared norm", BARE)


def sharing_tradeoff(
    summary: pd.DataFrame,
    by_task: pd.DataFrame,
    *,
    venue: str | None = None,
    floor: str = BARE,
) -> Figure:
    """Cost and score of every sharing scheme, one row each, dearest first.

    `summary` is `studies.sharing.sharing_summary`'s table, `by_task` that of `sharing_by_task` (scheme by task). Left:
    parameters per task in per cent of the backbone, with the goal as a line. Right: the share of the score of the
    summary's `reference`, mean over tasks with its interval (for other tasks) where one exists, a faint mark for each
    task; lines at 1, at the mean of `floor`, and (dotted) at the goal of 98 %. Controls have hollow marks.
    """
    shares_of = ("percent", "share", "share_low", "share_high")
    summary = require(summary, *shares_of, "reference", "tasks", numbers=("percent", "share"))
    reference = str(summary["reference"].iloc[0])
    for name in (reference, floor):
        check_choice("scheme", name, list(summary.index))
    order = summary.sort_values("percent", ascending=False, kind="stable")
    places = {scheme: len(order) - 1 - place for place, scheme in enumerate(order.index)}
    with style():
        figure = new_figure(venue)
        cost, score = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.2])
        look = looks(["scheme"])["scheme"]
        shares = by_task.div(by_task.loc[reference], axis="columns")
        for scheme, place in places.items():
            row = order.loc[scheme]
            face = "white" if scheme in CONTROLS else look.colour
            cost.hlines(place, 0, row["percent"], color=GRID, linewidth=1.2, zorder=1)
            score.plot(
                shares.loc[scheme], [place] * shares.shape[1], "|", color=FAINT, alpha=0.6, markersize=4
            )
            if pd.notna(row["share_low"]):
                score.hlines(place, row["share_low"], row["share_high"], color=look.colour, linewidth=1.2)
            for axis, value in ((cost, row["percent"]), (score, row["share"])):
                axis.plot(
                    value,
                    place,
                    look.marker,
                    color=look.colour,
                    markerfacecolor=face,
                    zorder=4,
                    markersize=4.4,
                )
        cost.axvline(GOAL_PARAMETERS, color=INK, linewidth=0.8, linestyle=DOTTED)
        cost.set_yticks(list(places.values()), list(places))
        cost.set_xlabel("% of the backbone per task")
        cost.set_xlim(left=0)
        score.axvline(1, color=INK, linewidth=0.8)
        score.axvline(
            order["share"].to_numpy()[order.index.get_loc(floor)],
            color=FAINT,
            linewidth=0.8,
            linestyle=DASHED,
        )
        score.axvline(GOAL_SHARE, color=INK, linewidth=0.8, linestyle=DOTTED)
        score.set_xlabel(NAMES.get(reference, f"Share of the score of {reference!r}"))
        for axis in (cost, score):
            axis.tick_params(axis="y", length=0)
            axis.margins(y=0.04)
        first = summary.iloc[0]
        note = (
            f"{int(first['tasks'])} tasks, {int(first['runs'])} runs; ticks: tasks, bars: 95 % interval for "
            f"other tasks (Fieller). Solid line: {reference}, dashed: {floor}, dotted: the goals of "
            f"{100 * GOAL_SHARE:g} % and of {GOAL_PARAMETERS:g} % per task. Hollow: controls. Heads are not counted; "
            "they are retrained in every scheme but the unshared."
        )
        frame(figure, ROW * len(order) + 0.4, note=note)
    return figure
