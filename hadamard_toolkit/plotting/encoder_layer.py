"""A drawing of one encoder layer with its sites, by the names that adapters and `sites.Sites` use."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting.attaching import Attaching, attaching
from hadamard_toolkit.plotting.panels import DOTTED
from hadamard_toolkit.plotting.style import FAINT, GRID, INK, frame, new_figure, style
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.sites import SITES

# All lengths are inches: the drawing has one size in every venue, and the text beside it takes the width that is left.
STEP = 0.2  # from row to row
LINE = 0.1  # from line to line of the text beside
MONOSPACED = "DejaVu Sans Mono"  # ships with matplotlib, as the style's own font does
STREAM, BLOCK = 0.48, 1.44  # x of the residual stream, and of the two blocks
TEXT = 2.12  # x of the text's left edge
NARROW = 4.0  # width of a figure without room for whole sentences beside the layer
SIDE = 0.36  # from the key's wire to the query's and the value's
# from bottom to top
ROWS = (
    "embeddings",
    *("read", "projections", "query", "attention", "attention_heads", "W_O", "attention_output", "dropout"),
    *("add", "attention_norm"),
    *(
        "read 2",
        "ffn_input",
        "W_1",
        "ffn_inner",
        "activation",
        "ffn_hidden",
        "W_2",
        "ffn_output",
        "dropout 2",
    ),
    *("add 2", "ffn_residual", "ffn_norm"),
    "next layer",
)
UP = {row: 0.14 + STEP * index for index, row in enumerate(ROWS)}
UP |= {"key": UP["query"], "value": UP["query"], "prefix": UP["attention"], "prompt": UP["embeddings"]}
ACROSS = {"query": BLOCK - SIDE, "value": BLOCK + SIDE, "prefix": 0.71, "prompt": BLOCK}
ACROSS |= dict.fromkeys(("attention_norm", "ffn_residual", "ffn_norm"), STREAM)
EXTRA = ("prefix", "prompt")  # sites that exist only where an adapter makes them
HEIGHT = UP["next layer"] + 0.04


def sites(adapter: Adapter | None = None, *, venue: str | None = None) -> Figure:
    """One encoder layer from bottom to top with every site of `sites.SITES`; marks where `adapter` attaches.

    Without an adapter, each site is explained in the words of that table (a venue as narrow as `"acl-column"` has no
    room for them). With one, the sites where it attaches are dark and have its formula beside them; the sites `prefix`
    and `prompt` are drawn where it makes them. The layer is that of BERT, whose norms follow the residual additions.
    The adapter is declared on BERT-base, and layers are named where it does not attach to all twelve.

    Raises `ArgumentError` for anything but an adapter, for a layer that BERT-base does not have, and for an unknown
    venue.
    """
    if adapter is not None and not isinstance(adapter, Adapter):
        raise ArgumentError(
            f"adapter={adapter!r} is not allowed; give an adapter such as Hadamard(), or None"
        )
    marks = Attaching() if adapter is None else attaching(adapter)
    with style():
        figure = new_figure(venue)
        frame(figure, HEIGHT, note=_note(adapter, marks))
        figure.set_layout_engine("none")  # everything below has its place
        width, whole = figure.get_size_inches()
        axis = figure.add_axes((0, 1 - HEIGHT / whole, 1, HEIGHT / whole), xlim=(0, width), ylim=(0, HEIGHT))
        axis.set_axis_off()
        _draw_layer(axis)
        for name in [*SITES, *(name for name in EXTRA if name in marks.lines)]:
            _draw_site(axis, name, dark=name in marks.sites)
        if adapter is None and width > NARROW:
            _explain(axis, {name: [words] for name, words in SITES.items()}, width)
        else:
            _explain(axis, marks.lines, width)
    return figure


def _draw_layer(axis: Axes) -> None:
    """Everything but the sites: the wires, and the operations on them."""
    bottom, top = UP["read"] - 0.09, UP["ffn_norm"] + 0.12
    around = _box(TEXT / 2 - 0.045, (bottom + top) / 2, TEXT - 0.17, top - bottom, face="#f7f7f7", edge=GRID)
    around.set_zorder(0)
    axis.add_patch(around)
    _wire(axis, (STREAM, UP["embeddings"]), (STREAM, HEIGHT))
    for name, matrix in (("query", "W_Q"), ("key", "W_K"), ("value", "W_V")):
        across = ACROSS.get(name, BLOCK)
        _wire(axis, (STREAM, UP["read"]), (across, UP["read"]), (across, UP["attention"]), arrow=False)
        _operation(axis, matrix, across, UP["projections"])
    _wire(axis, (BLOCK, UP["attention"]), (BLOCK, UP["add"]), (STREAM + 0.07, UP["add"]))
    start, end = UP["read 2"], UP["add 2"]
    _wire(axis, (STREAM, start), (BLOCK, start), (BLOCK, end), (STREAM + 0.07, end))
    for up in (UP["add"], end):
        axis.plot(STREAM, up, "o", color="white", markeredgecolor=INK, markeredgewidth=0.7, markersize=8)
        axis.plot(STREAM, up, "+", color=INK, markeredgewidth=0.7, markersize=5)
    _operation(axis, "embeddings", STREAM, UP["embeddings"])
    _operation(axis, "softmax(QKᵀ/√d) V", BLOCK, UP["attention"])
    for row in ("W_O", "dropout", "W_1", "activation", "W_2", "dropout 2"):
        _operation(axis, row.removesuffix(" 2"), BLOCK, UP[row])


def _wire(axis: Axes, *corners: tuple[float, float], arrow: bool = True) -> None:
    look: dict[str, Any] = {"color": INK, "linewidth": 0.7}
    axis.plot(*zip(*corners, strict=True), zorder=2, solid_joinstyle="miter", **look)
    if arrow:
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 6}
        axis.annotate("", corners[-1], corners[-2], arrowprops=head | look)


def _box(across: float, up: float, width: float, height: float, *, face: str, edge: str) -> FancyBboxPatch:
    corner = (across - width / 2, up - height / 2)
    look: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 0.6}
    rounded = "round,pad=0,rounding_size=0.03"
    return FancyBboxPatch(corner, width, height, boxstyle=rounded, zorder=3, **look)


def _operation(axis: Axes, words: str, across: float, up: float) -> None:
    axis.add_patch(_box(across, up, 0.08 + 0.049 * max(len(words), 3), 0.15, face=GRID, edge=GRID))
    axis.text(across, up - 0.005, words, fontsize=5.5, ha="center", va="center", zorder=4)


def _draw_site(axis: Axes, name: str, *, dark: bool) -> None:
    """A framed name on its wire; dark where an adapter attaches."""
    across, up = ACROSS.get(name, BLOCK), UP[name]
    axis.add_patch(_box(across, up, 0.08 + 0.051 * len(name), 0.15, face=INK if dark else "white", edge=INK))
    look: dict[str, Any] = {"fontsize": 6, "family": MONOSPACED, "color": "white" if dark else INK}
    axis.text(across, up - 0.005, name, ha="center", va="center", zorder=4, **look)


def _explain(axis: Axes, lines: Mapping[str, Sequence[str]], width: float) -> None:
    """Write what belongs to the sites of each row beside it, or as near as the other rows' texts let it."""
    letters = int((width - TEXT - 0.04) / 0.044)
    rows: dict[float, list[str]] = {}
    for name in sorted(lines, key=lambda name: (UP[name], ACROSS.get(name, BLOCK))):
        rows.setdefault(UP[name], []).append(name)
    texts = [_row_text({name: lines[name] for name in names}, letters) for names in rows.values()]
    heights = [LINE * (1 + text.count("\n")) for text in texts]
    for (up, names), text, middle in zip(rows.items(), texts, _apart(list(rows), heights), strict=True):
        across = ACROSS.get(names[-1], BLOCK)
        leader: dict[str, Any] = {"color": FAINT, "linewidth": 0.5, "linestyle": DOTTED, "zorder": 1}
        axis.plot([across, TEXT - 0.1, TEXT - 0.02], [up, up, middle], **leader)
        axis.text(TEXT, middle, text, fontsize=6, va="center", linespacing=1.15)


def _row_text(lines: Mapping[str, Sequence[str]], letters: int) -> str:
    """The lines of one row's sites, broken at `letters`; sites that say the same say it together."""
    named: dict[str, list[str]] = {}
    for name, of_site in lines.items():
        for line in of_site:
            named.setdefault(line, []).append(name)
    paragraphs = [line if len(lines) == 1 else f"{', '.join(names)}: {line}" for line, names in named.items()]
    return "\n".join(textwrap.fill(paragraph, letters) for paragraph in paragraphs)


def _apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """The middles of texts of these heights, from bottom to top, moved up and then down until none overlap."""
    middles, low = [], 0.0
    for middle, height in zip(wanted, heights, strict=True):
        middles.append(max(middle, low + height / 2))
        low = middles[-1] + height / 2
    high = HEIGHT
    for index in reversed(range(len(middles))):
        middles[index] = min(middles[index], high - heights[index] / 2)
        high = middles[index] - heights[index] / 2
    return middles


def _note(adapter: Adapter | None, marks: Attaching) -> str:
    norms = "Norms behind the additions, as in BERT. Frames: sites"
    if adapter is None:
        return f"{norms}."
    besides = f" Outside the layers it also trains: {', '.join(marks.elsewhere)}." if marks.elsewhere else ""
    return f"{norms}, dark where {label_of(adapter)} attaches.{besides}"
