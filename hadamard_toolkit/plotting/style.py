"""One look for every figure: sizes by venue, colours that survive colour blindness and grey, embedded fonts.

Nothing global is changed: figures are built inside `style()`, a context manager over matplotlib's settings.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.colors import Colormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from hadamard_toolkit.errors import ArgumentError, check_choice

WIDTHS = {"acl-column": 3.03, "acl-page": 6.30, "neurips": 5.50, "slide": 9.00}
"""Width in inches of what a venue prints: ACL column 7.7 cm and page 16 cm, NeurIPS text block, a slide."""

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e3e3e3"

SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"  # purple to orange: no red-green pair, and both ends dark in grey

SETTINGS: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so every machine draws the same glyphs
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.borderaxespad": 0.0,
    "image.cmap": SEQUENTIAL,
    "pdf.fonttype": 42,  # TrueType: venues reject the default Type 3
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "hadamard_toolkit",
}


@contextmanager
def style() -> Iterator[None]:
    """The toolkit's settings, for the length of the block."""
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's matplotlibrc: the same table must give the same bytes anywhere
        mpl.rcParams.update(SETTINGS)
        yield


class PaperFigure(Figure):
    """A figure that shows itself as a cell's value; pyplot does not know it, so nothing is shown twice or leaks."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        with style():
            self.savefig(stream, format="png", dpi=150)
        return stream.getvalue()


def new_figure(venue: str | None = None) -> PaperFigure:
    """An empty figure as wide as `venue` prints; `frame` gives it its height. Call inside `style()`.

    `venue` is a key of `WIDTHS`; None takes `$HADAMARD_VENUE`, else `"neurips"`.
    """
    venue = venue or os.environ.get("HADAMARD_VENUE") or "neurips"
    check_choice("venue", venue, WIDTHS)
    return PaperFigure(figsize=(WIDTHS[venue], 1))


LINE = 0.125  # inches from line to line of a legend
NOTE_LINE = 0.1  # the same of a note
EDGE = 0.04  # inches left free at the figure's edge


def frame(figure: Figure, height: float, *, handles: Sequence[Line2D] = (), note: str = "") -> None:
    """Give the panels `height` inches, and exactly the room above and below that legend and note need.

    The legend's rows hold as many entries as the width takes; the note is broken into lines.
    """
    width = figure.get_figwidth()
    columns = _columns([str(handle.get_label()) for handle in handles], width)
    above = LINE * -(-len(handles) // columns) + 2 * EDGE if handles else 0.0
    lines = textwrap.wrap(note, int(width / 0.0445))
    below = NOTE_LINE * len(lines) + EDGE if lines else 0.0
    whole = height + above + below
    figure.set_size_inches(width, whole)
    figure.set_layout_engine("constrained", rect=(0, below / whole, 1, height / whole))
    if handles:
        corner = (EDGE / width, 1 - EDGE / whole)
        spacing: dict[str, Any] = {"columnspacing": 1.4, "labelspacing": 0.3}
        figure.legend(
            handles=handles, ncols=columns, loc="upper left", bbox_to_anchor=corner, **spacing
        ).set_in_layout(False)
    if lines:
        look: dict[str, Any] = {"va": "bottom", "fontsize": 5.5, "color": FAINT, "linespacing": 1.25}
        figure.text(EDGE / width, EDGE / whole, "\n".join(lines), **look).set_in_layout(False)
    _literal(figure)


def _literal(figure: Figure) -> None:
    """Take words as they are: two `$` in the name of a task are no formula. Powers on log axes stay formulas."""
    powers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if axis.get_scale() == "log"
        for label in (*axis.get_ticklabels(minor=False), *axis.get_ticklabels(minor=True))
    }
    for words in figure.findobj(Text):
        if isinstance(words, Text):
            words.set_parse_math(words in powers)


def _columns(labels: Sequence[str], width: float) -> int:
    """The most legend columns whose widest entries fit side by side."""
    widths = [0.4 + 0.055 * len(label) for label in labels]
    for columns in range(len(labels), 1, -1):  # matplotlib fills them so: the first ones are the longer ones
        if sum(max(column) for column in np.array_split(widths, columns)) <= width:
            return columns
    return 1


@dataclass(frozen=True)
class Look:
    """How one class is drawn: colour, marker and line tell it apart, each alone."""

    colour: str
    marker: str
    line: Any


# seaborn's colour-blind palette, ordered so that neighbours differ in lightness too and red and green never meet early.
_ORDER = (0, 1, 4, 2, 5, 9, 3, 7)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.2)),
    (0, (1.2, 1.2)),
    (0, (5, 1.2, 1.2, 1.2)),
    (0, (2.5, 1.2)),
    (0, (5, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (8, 1.5)),
    (0, (1, 2.4)),
)


def looks(names: Iterable[Hashable]) -> dict[Hashable, Look]:
    """A `Look` for each name, in the order given; at most eight, beyond which no reader can tell them apart."""
    listed = list(dict.fromkeys(names))
    if len(listed) > len(_ORDER):
        raise ArgumentError(
            f"{len(listed)} classes in one panel; at most {len(_ORDER)} can be told apart: split the table"
        )
    palette = sns.color_palette("colorblind").as_hex()
    return {
        name: Look(palette[place], marker, line)
        for name, place, marker, line in zip(listed, _ORDER, _MARKERS, _LINES, strict=False)
    }


def centred(values: Any, centre: float) -> tuple[Colormap, TwoSlopeNorm]:
    """The diverging map and a norm that puts its white at `centre` (1 for Hadamard weights, 0 for differences).

    The norm is symmetric, so equal distances on both sides get equal strength.
    """
    reach = max((abs(float(value) - centre) for value in values), default=0.0) or 1.0
    return mpl.colormaps[DIVERGING], TwoSlopeNorm(vcenter=centre, vmin=centre - reach, vmax=centre + reach)
