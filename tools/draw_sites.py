"""Draw docs/sites.svg, the encoder layer with its sites: python tools/draw_sites.py"""

from __future__ import annotations

import io

import matplotlib as mpl

from hadamard_toolkit import plotting
from hadamard_toolkit.paths import CHECKOUT, atomic_write

DRAWING = CHECKOUT / "docs" / "sites.svg"


def drawing() -> str:
    """The SVG: letters as outlines, so that it looks the same whatever fonts a reader has."""
    stream = io.StringIO()
    with plotting.style(), mpl.rc_context({"svg.fonttype": "path"}):
        plotting.sites().savefig(stream, format="svg", metadata={"Creator": None, "Date": None})
    return stream.getvalue()


if __name__ == "__main__":
    atomic_write(DRAWING, drawing())
