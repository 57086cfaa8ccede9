"""Figures of sparse adapters: what pruning costs, and where the masks fall."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.plotting.panels import (
    DOTTED,
    EDGED,
    check_one_row,
    counted,
    label_below,
    label_left,
    legend_handles,
    panels_by_task,
    plural,
    require,
    seeds_text,
)
from hadamard_toolkit.plotting.style import FAINT, INK, Look, frame, looks, style

# A scorer keeps its look from figure to figure, whichever of them a table has.
SCORER_ORDER = ("snip", "grasp", "magnitude", "synflow", "random", "erdos-renyi")
NO_CONTROL = "none"
CONTROL_MARKERS = {
    "shuffled": ">",
    "margins": "p",
    "random": "<",
    "uniform": "s",
    "reinitialised": "D",
    "dense": "*",
}
CONTROL_NAMES = {
    "shuffled": "shuffled",
    "margins": "shuffled within margins",
    "random": "random per tensor",
    "uniform": "random overall",
    "reinitialised": "re-initialised",
    "dense": "small dense",
}
CELL = ("panel", "scorer", "sparsity", "control")
Slots = list[tuple[float, float, float]]  # first and last place on the axis, sparsity of what stands there
DODGE = 0.9  # percentage points between neighbouring series, so that their bars can be told apart
STEP = 2.6  # the same between a mask and its controls
SIDE = 0.07  # of a layer, between the marks of neighbouring scorers


def score_against_sparsity(table: pd.DataFrame, *, venue: str | None = None, metric: str = "Score") -> Figure:
    """The price of pruning: score against the share removed, a line per scorer, controls beside their mask.

    Table: one row per run: `task`, `scorer`, `sparsity` (share removed, 0 <= s < 1), `seed`, `score`. Optional:
    `adapter` (with several, each has its own panels) and `control`: `"none"` for the mask itself, or `"shuffled"`,
    `"margins"`, `"random"`, `"uniform"`, `"reinitialised"`, `"dense"` (the small dense adapter, at the sparsity whose
    budget it has; its scorer is not read). Rows of sparsity 0 are the unpruned adapter, whatever their scorer.

    Drawn: mean ± one standard deviation over seeds, marks set side by side where they would cover each other; the
    unpruned adapter as a line across with its deviation as a band. Controls stand on the right, hollow, in the colour
    of their scorer and behind the mask that they vary.

    Where the marks of a panel do not all have the same seeds, means of scores would compare seeds, not sparsities. Then
    all panels show differences to the unpruned run of the same seed. A sparsity with fewer seeds than another of the
    figure has their number under it, and a mark with fewer than others of its sparsity has it above. Runs without an
    unpruned one are left out, and the note counts them.

    Simulated: a loss of 0.020 at 40 and 80 % with other seeds at each is drawn as −0.020 at both, where means of scores
    showed +0.005 and −0.020. `pytest tests/plotting/test_sparse.py -k seeds`.
    """
    table = require(table, "task", "scorer", "sparsity", "seed", "score", numbers=("sparsity", "score"))
    runs = _checked_runs(table)
    paired = not _same_seeds(runs)
    if paired:
        runs = _differences(runs)
    sizes = runs.groupby([*CELL], observed=True)["seed"].transform("size")
    runs = runs.assign(most=sizes.groupby([runs["panel"], runs["sparsity"]]).transform("max"))
    with style():
        figure, panels, height = panels_by_task(runs["panel"], venue, height=1.6)
        drawn = _scorer_looks(runs.loc[(runs["sparsity"] > 0) & (runs["control"] != "dense"), "scorer"])
        for axis, (title, rows) in zip(panels, runs.groupby("panel", sort=False), strict=True):
            _unpruned(axis, rows.loc[rows["sparsity"] == 0, "score"].to_numpy(dtype=float))
            _series(axis, rows[rows["sparsity"] > 0], drawn)
            axis.set_title(str(title))
            axis.grid(axis="y")
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            _across(axis, rows, drawn, int(runs["most"].max()))
        if paired:
            # with an axis of its own, a panel with a single run would magnify its differences
            ends = [end for axis in panels for end in axis.get_ylim()]
            for axis in panels:
                axis.set_ylim(min(ends), max(ends))
        label_left(panels, f"{metric} − unpruned" if paired else metric)
        label_below(panels, "Removed, %")
        frame(figure, height, handles=_score_legend(runs, drawn), note=_score_note(runs, len(table), paired))
    return figure


def density_by_layer(table: pd.DataFrame, *, venue: str | None = None) -> Figure:
    """Where masks fall: the share kept in each layer, one panel per adapter, a line per scorer.

    Table: `adapter`, `scorer`, `layer` (from 0), `entries` and `kept` (counts); rows of one layer, such as its tensors
    or sites, are added up. Optional `seed`: the line is then the mean, a band reaches from the least to the most. A
    line across marks the share kept overall, which all masks of a panel must have, to one entry.
    """
    table = require(
        table, "adapter", "scorer", "layer", "entries", "kept", numbers=("layer", "entries", "kept")
    )
    if (bad := (table["kept"] < 0) | (table["kept"] > table["entries"]) | (table["entries"] <= 0)).any():
        first = table.loc[bad, ["entries", "kept"]].iloc[0].to_dict()
        raise ArgumentError(f"table holds {first}; 0 <= kept <= entries and entries > 0 are needed")
    masks = table if "seed" in table.columns else table.assign(seed=0)
    with style():
        figure, panels, height = panels_by_task(table["adapter"], venue, height=1.45)
        drawn = _scorer_looks(table["scorer"])
        for axis, (adapter, rows) in zip(
            panels, masks.groupby("adapter", sort=False, observed=True), strict=True
        ):
            axis.axhline(100 * _overall(adapter, rows), color=FAINT, linewidth=0.8, zorder=1)
            for place, (scorer, look) in enumerate(drawn.items()):
                shift = SIDE * (place - (len(drawn) - 1) / 2)
                _densities(axis, rows[rows["scorer"] == scorer], look, shift, zorder=4 - place / 10)
            layers = sorted(int(layer) for layer in rows["layer"].unique())
            axis.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
            axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axis.grid(axis="y")
            axis.set_title(str(adapter))
        label_left(panels, "Kept, %")
        label_below(panels, "Layer")
        several = masks.groupby("adapter", observed=True)["seed"].nunique().max() > 1
        spread = f"Line: mean, band: least to most of {seeds_text(masks, 'adapter')}. " if several else ""
        count = "" if several else " One seed, so no spread." if "seed" in table.columns else ""
        note = (
            f"{spread}Grey line: the share kept of the adapter as a whole, the same for all scorers.{count}"
        )
        frame(figure, height, handles=legend_handles(drawn), note=note)
    return figure


def _checked_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `control` and `panel`; `ArgumentError` for what cannot be drawn."""
    shares = table["sparsity"]
    if ((shares < 0) | (shares >= 1)).any():
        wrong = sorted(set(shares[(shares < 0) | (shares >= 1)]))
        raise ArgumentError(f"table['sparsity'] holds {wrong}; it is the share removed, 0 <= sparsity < 1")
    runs = table if "control" in table.columns else table.assign(control=NO_CONTROL)
    for control in runs["control"].unique():
        check_choice("table['control']", control, (NO_CONTROL, *CONTROL_MARKERS))
    panel = runs["task"].astype(str)
    if "adapter" in runs.columns and runs["adapter"].nunique() > 1:
        # the titles of four panels are short: one task for all adapters goes into the note
        adapter = runs["adapter"].astype(str)
        panel = adapter if runs["task"].nunique() == 1 else adapter + ", " + panel
    # a run without pruning is the same run under every scorer, and so is the small dense adapter
    same = (runs["sparsity"] == 0) | (runs["control"] == "dense")
    runs = runs.assign(panel=panel, scorer=runs["scorer"].mask(same, "dense"))
    check_one_row(runs, "panel", "scorer", "sparsity", "control", "seed")
    return runs


def _same_seeds(runs: pd.DataFrame) -> bool:
    """Whether all marks of each panel have the same seeds."""
    seeds = runs.groupby([*CELL], observed=True)["seed"].agg(frozenset)
    return bool((seeds.groupby("panel").nunique() == 1).all())


def _differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores minus that of the unpruned run of the same panel and seed; runs without one are left out."""
    unpruned = runs[runs["sparsity"] == 0].set_index(["panel", "seed"])["score"].rename("unpruned")
    joined = runs.join(unpruned, on=["panel", "seed"])
    known = joined[joined["unpruned"].notna()]
    for panel, rows in runs.groupby("panel", sort=False):
        pruned = known[(known["panel"] == panel) & (known["sparsity"] > 0)]
        if pruned.empty and (rows["sparsity"] > 0).any():
            raise ArgumentError(
                f"table has no unpruned run (sparsity 0) with the seed of a pruned one in {panel!r}; as the marks do "
                "not all have the same seeds, differences are drawn. Add it, or keep the seeds that all marks have"
            )
    return known.assign(score=known["score"] - known["unpruned"])


def _scorer_looks(scorers: pd.Series) -> dict[Hashable, Look]:
    present = list(dict.fromkeys(scorers))
    known = [scorer for scorer in SCORER_ORDER if scorer in present]
    everything = looks((*SCORER_ORDER, *(scorer for scorer in present if scorer not in SCORER_ORDER)))
    return {scorer: everything[scorer] for scorer in (*known, *(s for s in present if s not in known))}


def _unpruned(axis: Axes, scores: np.ndarray) -> None:
    if not scores.size:
        return
    mean = scores.mean()
    if scores.size > 1:
        deviation = scores.std(ddof=1)
        if deviation > 0:  # of differences to itself it is 0
            axis.axhspan(mean - deviation, mean + deviation, color=FAINT, alpha=0.16, linewidth=0, zorder=0)
    axis.axhline(mean, color=FAINT, linewidth=1.0, zorder=1)


def _series(axis: Axes, rows: pd.DataFrame, drawn: Mapping[Hashable, Look]) -> None:
    """A line per scorer."""
    for place, (scorer, look) in enumerate(drawn.items()):
        masks = rows[(rows["scorer"] == scorer) & (rows["control"] == NO_CONTROL)]
        at = 100 * masks["sparsity"] + DODGE * (place - (len(drawn) - 1) / 2)
        line = {"marker": look.marker, "linestyle": look.line}
        _means(axis, masks.assign(at=at), look.colour, zorder=3, **line, **EDGED)


def _controls(axis: Axes, rows: pd.DataFrame, drawn: Mapping[Hashable, Look], start: float) -> Slots:
    """From `start` on, for each sparsity with controls: every mask once more, then its controls."""
    slots: Slots = []
    for share, part in rows[rows["sparsity"].isin(_controlled(rows))].groupby("sparsity"):
        at = start
        of_masks = part.loc[~part["control"].isin([NO_CONTROL, "dense"]), "scorer"]
        for scorer in [name for name in drawn if name in set(of_masks)]:
            look, of_scorer = drawn[scorer], part[part["scorer"] == scorer]
            for control in [NO_CONTROL, *CONTROL_MARKERS]:
                if not (runs := of_scorer[of_scorer["control"] == control]).empty:
                    shape = _hollow(control, look.colour) if control in CONTROL_MARKERS else EDGED
                    marker = {"marker": look.marker} | shape
                    _means(axis, runs.assign(at=at), look.colour, linestyle="none", zorder=4, **marker)
                    at += STEP
        if not (dense := part[part["control"] == "dense"]).empty:
            _means(axis, dense.assign(at=at), INK, linestyle="none", zorder=4, **_hollow("dense", INK))
            at += STEP
        slots.append((start, at - STEP, float(str(share))))
        start = at + STEP
    return slots


def _hollow(control: str, colour: str) -> dict[str, Any]:
    size = 5.0 if control == "dense" else 3.4
    edge = {"markeredgecolor": colour, "markeredgewidth": 0.9, "markersize": size}
    return {"marker": CONTROL_MARKERS[control], "markerfacecolor": "white", **edge}


def _controlled(rows: pd.DataFrame) -> list[float]:
    return list(rows.loc[rows["control"] != NO_CONTROL, "sparsity"].unique())


def _means(axis: Axes, rows: pd.DataFrame, colour: str, **look: Any) -> None:
    """Mean ± one standard deviation by place `at`; no bar where there is one seed, a number where seeds are fewer."""
    if rows.empty:
        return
    by_place = rows.groupby("at")["score"]
    mean, deviation = by_place.mean(), by_place.std(ddof=1)
    known = deviation.notna()
    low, high = (mean - deviation)[known], (mean + deviation)[known]
    axis.vlines(mean.index[known], low, high, color=colour, linewidth=0.8, alpha=0.8, zorder=2)
    axis.plot(mean.index, mean, color=colour, **look)
    count = by_place.size()
    for at in count.index[count < rows.groupby("at")["most"].first()]:
        where: dict[str, Any] = {
            "xytext": (0, 3),
            "textcoords": "offset points",
            "ha": "center",
            "va": "bottom",
        }
        axis.annotate(str(count[at]), (at, mean[at]), fontsize=5, color=colour, zorder=5, **where)


def _across(axis: Axes, rows: pd.DataFrame, drawn: Mapping[Hashable, Look], most: int) -> None:
    """The horizontal axis: sparsities, then a dotted line and the controls, by the sparsity of their masks.

    A sparsity with fewer seeds than `most`, the largest number in the figure, has their number under it.
    """
    masks = rows[rows["control"] != "dense"]  # the small dense adapter stands among the controls only
    shares = sorted(100 * share for share in set((masks if len(masks) else rows)["sparsity"]) if share > 0)
    if not shares:
        axis.set_xticks([])
        return
    edge = shares[-1] + DODGE * len(drawn) / 2 + STEP
    slots = _controls(axis, rows, drawn, edge + 2.5 * STEP)
    ticks = [share for share in shares if len(shares) <= 5 or round(share) % 20 == 0]
    by_share = rows.groupby("sparsity")["most"].max()
    seeds = dict(zip(100 * by_share.index.to_numpy(float), by_share.to_numpy(), strict=True))
    labels = [f"{share:.3g}" + (f"\nn={seeds[share]}" if seeds[share] < most else "") for share in ticks]
    right = edge
    if slots:
        ticks = [*ticks, (slots[0][0] + slots[-1][1]) / 2]
        labels.append("controls\nat " + ", ".join(f"{100 * share:.3g}" for *_, share in slots))
        axis.axvline(edge, color=FAINT, linewidth=0.7, linestyle=DOTTED, zorder=1)
        right = slots[-1][1] + STEP
    axis.set_xticks(ticks, labels)
    axis.set_xlim(shares[0] - DODGE * len(drawn) / 2 - STEP, right)


def _score_legend(runs: pd.DataFrame, drawn: Mapping[Hashable, Look]) -> list[Line2D]:
    handles = legend_handles(drawn)
    if (runs["sparsity"] == 0).any():
        handles.append(Line2D([], [], color=FAINT, linewidth=1.0, label="unpruned"))
    for control, name in CONTROL_NAMES.items():
        if (runs["control"] == control).any():
            handles.append(Line2D([], [], label=name, linestyle="none", **_hollow(control, INK)))
    return handles


def _score_note(runs: pd.DataFrame, rows: int, paired: bool) -> str:
    sizes = runs.groupby([*CELL], observed=True)["seed"].size()
    count = f"n\u00a0=\u00a0{counted(sizes)}"
    text = (
        f"Mean ± one standard deviation over seeds, {count}."
        if sizes.max() > 1
        else "One seed, so no spread."
    )
    if paired:
        text += (
            " Differences to the unpruned run of the same seed; n and numbers: seeds where there are fewer."
        )
    if left := rows - len(runs):
        text += f" Left out, no unpruned run of the same seed: {plural(left, 'run')}."
    if (runs["control"] != NO_CONTROL).any():
        text += " Hollow: controls, in the colour of the scorer whose masks (filled) they vary."
    tasks = runs["task"].unique()
    if len(tasks) == 1 and tasks[0] not in set(runs["panel"]):
        text = f"Task: {tasks[0]}. {text}"
    return f"{text} Marks of one sparsity are set side by side."


def _overall(adapter: object, rows: pd.DataFrame) -> float:
    """The share kept, the same for all masks of a panel."""
    totals = rows.groupby(["scorer", "seed"], observed=True)[["entries", "kept"]].sum()
    if totals["entries"].nunique() > 1 or totals["kept"].max() - totals["kept"].min() > 1:
        shares = sorted(set((totals["kept"] / totals["entries"]).round(3)))
        raise ArgumentError(
            f"table holds masks of {adapter!r} that keep different shares or sizes ({shares}); one sparsity is drawn"
        )
    return float(totals["kept"].iloc[0] / totals["entries"].iloc[0])


def _densities(axis: Axes, rows: pd.DataFrame, look: Look, shift: float, zorder: float) -> None:
    if rows.empty:
        return
    counts = rows.groupby(["seed", "layer"], observed=True)[["entries", "kept"]].sum()
    by_layer = (100 * counts["kept"] / counts["entries"]).groupby("layer")
    mean, least, most = by_layer.mean(), by_layer.min(), by_layer.max()
    layers = mean.index.to_numpy(dtype=float) + shift
    if rows["seed"].nunique() > 1:
        axis.fill_between(layers, least, most, color=look.colour, alpha=0.18, linewidth=0)
    shape: dict[str, Any] = {"marker": look.marker, "linestyle": look.line, **EDGED}
    axis.plot(layers, mean, color=look.colour, linewidth=0.9, zorder=zorder, **shape)
