"""Write a table for a paper: LaTeX with booktabs, and Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tabulate import tabulate

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.paths import atomic_write
from hadamard_toolkit.plotting.export import check_name, refuse_smoke, target_folder

SYMBOLS = {
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "²": "$^2$",
    "³": "$^3$",
    "ρ": r"$\rho$",
    "≥": r"$\geq$",
}

COMMANDS = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}


class SavedTable(NamedTuple):
    """The two files of one table."""

    tex: Path
    md: Path


def save_table(
    table: pd.DataFrame,
    name: str,
    *,
    caption: str,
    folder: str | Path | None = None,
    profile: str | None = None,
) -> SavedTable:
    """Write `table`, its index first, as `<name>.tex` (a LaTeX table with booktabs) and `<name>.md`; return both paths.

    Cells are written as they are: format numbers before, with their spread and n. Folder and profile as in `save`; a
    smoke table goes under `build/` and never replaces another. The same table gives the same bytes.
    """
    check_name(name)
    if table.empty:
        raise ArgumentError(f"table of {name!r} is empty; there is nothing to write")
    target, profile = target_folder(folder, profile)
    files = SavedTable(target / f"{name}.tex", target / f"{name}.md")
    refuse_smoke(target / f"{name}.json", profile)
    flat = table.reset_index() if any(table.index.names) else table
    heads = [" / ".join(map(str, h)) if isinstance(h, tuple) else str(h) for h in flat.columns]
    cells = [["" if pd.isna(cell) else str(cell) for cell in row] for row in flat.itertuples(index=False)]
    shape: dict[str, Any] = {
        "headers": heads,
        "disable_numparse": True,
        "colalign": ["left", *["right"] * (len(heads) - 1)],
    }
    body = _latex(tabulate(cells, tablefmt="latex_booktabs", **shape))
    label = re.sub(r"[^a-z0-9]+", "-", name.lower())
    atomic_write(
        files.tex,
        f"\\begin{{table}}\n\\centering\n{body}\n\\caption{{{_latex(_escape(caption))}}}\n\\label{{tab:{label}}}\n\\end{{table}}\n",
    )
    atomic_write(files.md, f"{tabulate(cells, tablefmt='github', **shape)}\n\n{caption}\n")
    return files


def _latex(text: str) -> str:
    for symbol, command in SYMBOLS.items():
        text = text.replace(symbol, command)
    return text


def _escape(text: str) -> str:
    """Text in which no character means anything to LaTeX; in one pass, as the commands hold such characters too."""
    return re.sub(r"[&%$#_{}\\^~]", lambda match: COMMANDS.get(match[0], f"\\{match[0]}"), text)
