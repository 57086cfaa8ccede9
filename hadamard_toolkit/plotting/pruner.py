"""What the layer pruner shows, as a figure for a page: what is kept, and what that does to the score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.panels import require
from hadamard_toolkit.plotting.style import FAINT, INK, frame, new_figure, style

SITES = {
    "attention_output": "Hadamard vectors, √(‖W−1‖² + ‖b‖²)",
    "attention_heads": "Hadamard vectors, √(‖W−1‖² + ‖b‖²)",
    "attention_norm": "attention norm, distance moved",
    "ffn_norm": "output norm, distance moved",
}
GONE: dict[str, Any] = {"facecolor": "white", "hatch": "////", "linewidth": 0.6}


def pruned_layers(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """Which parts are kept, with their importance, and the score with them against the unpruned model.

    Table: `task`, `layer`, `site`, `kept` (bool), `importance`, and per task, the same in each of its rows, `metric`,
    `split`, `value`, `full`, `difference`, `low`, `high` (NaN where no prediction changed) and `n`.
    Drawn per site: a bar per layer and task, filled where kept, hatched where pruned; below: the difference in score
    with its interval.
    """
    numbers = ("layer", "importance", "value", "full", "difference", "n")
    table = require(
        table, "task", "site", "kept", "metric", "split", "low", "high", *numbers, numbers=numbers
    )
    tasks, sites = list(dict.fromkeys(table["task"])), list(dict.fromkeys(table["site"]))
    scores = table.drop_duplicates("task").set_index("task")
    per_task = ["metric", "split", "value", "full", "difference", "n"]
    if (table.groupby("task")[per_task].nunique() > 1).any(axis=None):
        raise ArgumentError("table has more than one score for a task")
    palette = sns.color_palette("colorblind").as_hex()
    colours = {task: palette[index % len(palette)] for index, task in enumerate(tasks)}
    with style():
        figure = new_figure(venue)
        heights = [1.0] * len(sites) + [0.25 + 0.2 * len(tasks)]
        axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axis, site in zip(axes, sites, strict=False):
            _bars(axis, table[table["site"] == site], tasks, colours)
            axis.set_title(SITES.get(site, f"{site}, norm of its parameters"))
        axes[len(sites) - 1].set_xlabel("Layer")
        _differences(axes[-1], scores, tasks, colours)
        handles: Any = [Patch(facecolor=FAINT, label="kept"), Patch(label="pruned", edgecolor=FAINT, **GONE)]
        if len(tasks) > 1:
            handles += [Patch(facecolor=colours[task], label=task) for task in tasks]
        frame(figure, sum(heights) + 0.35 * len(heights), handles=handles, note=_note(scores))
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, tasks: list[str], colours: dict[str, str]) -> None:
    layers = sorted(int(layer) for layer in rows["layer"].unique())
    width = 0.7 / len(tasks)
    for index, task in enumerate(tasks):
        for row in rows[rows["task"] == task].itertuples():
            place = layers.index(int(row.layer)) + (index - (len(tasks) - 1) / 2) * width  # type: ignore[arg-type]
            look: dict[str, Any] = (
                {"facecolor": colours[task], "linewidth": 0}
                if row.kept
                else {**GONE, "edgecolor": colours[task]}
            )
            axis.bar(place, float(row.importance), width * 0.9, **look)  # type: ignore[arg-type]
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.set_major_locator(MaxNLocator(3))


def _differences(axis: Axes, scores: pd.DataFrame, tasks: list[str], colours: dict[str, str]) -> None:
    axis.axvline(0, color=FAINT, linewidth=0.6, zorder=1)
    for place, task in enumerate(tasks):
        row = scores.loc[task]
        if np.isfinite(row["low"]):
            axis.hlines(place, row["low"], row["high"], color=colours[task], linewidth=1.6, zorder=2)
        axis.plot(
            row["difference"],
            place,
            "o",
            color=colours[task],
            markeredgecolor="white",
            markersize=5,
            zorder=3,
        )
        axis.annotate(
            f"{row['full']:.3f} → {row['value']:.3f}", (1, place), xycoords=("axes fraction", "data"),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5, color=INK,
        )  # fmt: skip
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_ylim(len(tasks) - 0.4, -0.6)
    reach = float(np.nanmax(np.abs(scores[["low", "high", "difference"]].to_numpy(dtype=float))))
    axis.set_xlim(-1.1 * (reach or 0.01), 1.1 * (reach or 0.01))
    axis.set_title(f"Pruned − unpruned, {', '.join(dict.fromkeys(scores['metric']))}")
    axis.tick_params(axis="y", length=0)


def _note(scores: pd.DataFrame) -> str:
    counted = ", ".join(
        f"{row.n:g} {row.split} rows" for row in scores.drop_duplicates(["n", "split"]).itertuples()
    )
    return (
        "Pruned after training, head as trained; one run each. Bar below: 95 % interval of the paired "
        f"difference on {counted}; it says how other rows would vary it, not other seeds."
    )
