"""Write a figure for a paper: vector PDF, 300 dpi PNG, and a JSON that says where its numbers come from.

The same table gives the same bytes: no dates, no paths, no commit (the table's hash identifies the data). Tables are
rounded before they are drawn and before they are hashed, as other processors add up in another order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.paths import CHECKOUT, atomic_write, in_checkout
from hadamard_toolkit.plotting.style import INK, style
from hadamard_toolkit.runs.environment import toolkit_version

SMOKE = "smoke"
DIGITS = 9  # significant ones; a sum in another order differs at the sixteenth
INLINE_ROWS = 200  # a table of at most so many rows is stored whole in the JSON
STRIP = 0.13  # inches that the smoke mark adds above the figure

FigureT = TypeVar("FigureT", bound=Figure)


class Saved(NamedTuple):
    """The three files of one figure."""

    pdf: Path
    png: Path
    json: Path


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its floats at nine significant digits, which all processors agree on."""
    copy = table.copy()
    for name in table.select_dtypes([np.float32, np.float64]).columns:
        # through text, because a processor's logarithm may round a power of ten differently
        copy[name] = [float(f"{value:.{DIGITS}g}") for value in table[name].to_numpy(float)]
    return copy


def table_hash(table: pd.DataFrame) -> str:
    """SHA-256 of the table as CSV (rows and columns in their order, index left out, floats in full)."""
    return hashlib.sha256(table.to_csv(index=False, lineterminator="\n").encode()).hexdigest()


def save(
    figure: Figure,
    name: str,
    *,
    table: pd.DataFrame,
    folder: str | Path | None = None,
    profile: str | None = None,
    caption: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Saved:
    """Write `figure` as `<name>.pdf`, `<name>.png` and `<name>.json` and return the three paths.

    `table` is what the figure shows, and is `rounded` here as it was for drawing; its hash, columns and (when small)
    rows go into the JSON, its hash and the profile into the PDF's and PNG's own metadata. `caption` and `notes` (JSON
    values: seeds, run keys, …) too.
    `profile` defaults to `$HADAMARD_PROFILE`, else `smoke`. A smoke figure carries a mark in its corner.

    `folder` defaults to `$HADAMARD_FIGURES`, else `figures`. A relative one starts at the root of the checkout when the
    working folder is inside it, else at the working folder; in the smoke profile it lies under `build/` there, so the
    reference set is not touched. An absolute one is taken as it is. Raises `ArgumentError` where a smoke figure would
    replace one of another profile, and for a name that is not a plain file name.
    """
    check_name(name)
    target, profile = target_folder(folder, profile)
    files = Saved(*(target / f"{name}.{ending}" for ending in ("pdf", "png", "json")))
    refuse_smoke(files.json, profile)

    record = _provenance(name, rounded(table), profile, caption, notes)
    known = f"profile={profile} table_sha256={record['table']['sha256']}"
    creator = f"hadamard_toolkit {record['versions']['hadamard_toolkit']}"
    titled = {"Title": name, **({"Subject": caption} if caption else {})}
    with style(), _marked(figure, profile) as canvas:
        pdf = _render(
            figure, "pdf", {**titled, "Creator": creator, "Keywords": known, "CreationDate": None}, canvas
        )
        png = _render(figure, "png", {"Title": name, "Software": creator, "Comment": known}, canvas)
    atomic_write(files.pdf, pdf)
    atomic_write(files.png, png)
    atomic_write(files.json, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return files


def publish(
    figure: FigureT,
    name: str,
    *,
    table: pd.DataFrame,
    caption: str,
    profile: str | None = "reference",
    folder: str | Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> FigureT:
    """`save` the figure of a study and return it, so that a notebook's cell ends with it and shows it.

    A study reads finished runs, so its figures belong to the reference set. Give `profile=None` for a figure of runs
    that the notebook trained itself: it takes `$HADAMARD_PROFILE`, and a smoke figure is marked and kept apart.
    """
    save(figure, name, table=table, folder=folder, profile=profile, caption=caption, notes=notes)
    return figure


def check_name(name: str) -> None:
    """`ArgumentError` for a name that is not a plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ArgumentError(
            f"name={name!r} is not allowed; letters, digits, '_', '-' and '.' make a figure's name"
        )


def target_folder(folder: str | Path | None, profile: str | None) -> tuple[Path, str]:
    """Where a figure of this profile goes, and the profile; see `save`."""
    profile = profile or os.environ.get("HADAMARD_PROFILE") or SMOKE
    chosen = Path(folder or os.environ.get("HADAMARD_FIGURES") or "figures").expanduser()
    if chosen.is_absolute():
        return chosen, profile
    here = Path.cwd()
    root = CHECKOUT if in_checkout() and here.resolve().is_relative_to(CHECKOUT) else here
    return (root / "build" / chosen if profile == SMOKE else root / chosen), profile


def refuse_smoke(record: Path, profile: str) -> None:
    """`ArgumentError` where a smoke figure would replace one of another profile."""
    if profile != SMOKE or not record.is_file():
        return
    present = json.loads(record.read_text(encoding="utf-8")).get("profile")
    if present != SMOKE:
        raise ArgumentError(
            f"folder={str(record.parent)!r} already holds {record.stem!r} of profile {present!r}, "
            f"and a smoke figure never replaces one; choose another folder or set HADAMARD_PROFILE"
        )


def _provenance(
    name: str, table: pd.DataFrame, profile: str, caption: str | None, notes: Mapping[str, Any] | None
) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "sha256": table_hash(table),
        "rows": len(table),
        "columns": {str(column): str(kind) for column, kind in table.dtypes.items()},
    }
    if len(table) <= INLINE_ROWS:
        shown["records"] = json.loads(table.to_json(orient="records", double_precision=15))
    return {
        "figure": name,
        "profile": profile,
        "caption": caption,
        "notes": dict(notes or {}),
        "table": shown,
        "versions": {"hadamard_toolkit": toolkit_version(), "matplotlib": mpl.__version__},
    }


def _render(figure: Figure, kind: str, metadata: dict[str, Any], canvas: Bbox) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=300, metadata=metadata, bbox_inches=canvas)
    return stream.getvalue()


@contextmanager
def _marked(figure: Figure, profile: str) -> Iterator[Bbox]:
    """The canvas to save, in inches; in the smoke profile it has a strip above the figure that says so."""
    width, height = figure.get_size_inches()
    if profile != SMOKE:
        yield Bbox.from_bounds(0, 0, width, height)
        return
    strip = Rectangle(
        (0, height), width, STRIP, color="#f0f0f0", linewidth=0, transform=figure.dpi_scale_trans
    )
    text = "smoke run: shows that the code works, not a result"
    place: dict[str, Any] = {"ha": "right", "va": "center_baseline", "fontsize": 5.5, "color": INK}
    figure.add_artist(strip)
    words = figure.text(width - 0.04, height + STRIP / 2, text, transform=figure.dpi_scale_trans, **place)
    for part in (strip, words):
        part.set_in_layout(False)
    try:
        yield Bbox.from_bounds(0, 0, width, height + STRIP)
    finally:  # the caller's figure stays as it was
        words.remove()
        strip.remove()
