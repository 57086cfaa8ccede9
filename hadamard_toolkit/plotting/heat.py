"""Matrices as coloured cells with their values written in, and the colour scale that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from hadamard_toolkit.plotting.style import INK, SEQUENTIAL, centred

MISSING = "#f2f2f2"
Scale = tuple[Colormap, Normalize]


def colour_scale(values: np.ndarray) -> Scale:
    """From 0 up where no value is far below 0, else both ways from 0. Missing values do not count."""
    low, high = np.nanmin(values), np.nanmax(values)
    if low < -0.25 * abs(high):
        return centred(values[np.isfinite(values)], 0.0)
    return mpl.colormaps[SEQUENTIAL], Normalize(0, max(high, 1e-9))


def two_decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".").replace("-", "−")


def heat(
    axis: Axes,
    matrix: np.ndarray,
    scale: Scale,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    written: Callable[[float], str] = two_decimals,
    size: float = 5.0,
) -> AxesImage:
    """Draw `matrix` [rows, columns] on `axis`; missing cells are blank, and a value is `written` into every other."""
    colours, norm = scale
    axis.set_facecolor(MISSING)
    image = axis.imshow(
        np.ma.masked_invalid(matrix), cmap=colours, norm=norm, aspect="equal", interpolation="nearest"
    )
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK
            axis.text(column, row, written(value), ha="center", va="center", fontsize=size, color=ink)
    axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def colour_bar(figure: Figure, image: AxesImage, panels: Sequence[Axes], label: str) -> None:
    """One bar for all `panels`, to their right."""
    bar = figure.colorbar(image, ax=list(panels), label=label, aspect=25, shrink=0.8, pad=0.015)
    bar.outline.set_visible(False)
