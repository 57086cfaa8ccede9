"""Every paper figure again, from the store: `make figures`, `hadamard figures`, or `python tools/figures.py`."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest import mock

from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import check_choice
from hadamard_toolkit.plotting.style import WIDTHS

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
# The notebooks that read runs and train nothing; 10_paper_figures draws what the others do not.
NOTEBOOKS = (
    "05_why_hadamard",
    "06_layer_pruning",
    "07_cross_task_similarity",
    "08_mask_statistics",
    "09_shared_adapters",
    "10_paper_figures",
    "11_how_many_numbers",
)


def draw_all(
    store: str | Path | None = None, folder: str | Path | None = None, venue: str = "neurips"
) -> Iterator[str]:
    """Run the study notebooks as scripts, one after the other; yields the name of each when it is done.

    Their figures (.pdf, .png, .json) and tables (.tex, .md) go to `folder`, by default `figures/` of the checkout. The
    runs are those of `store`, by default the committed reference runs. `venue` is a key of `plotting.WIDTHS`.
    """
    check_choice("venue", venue, WIDTHS)
    chosen = {"HADAMARD_VENUE": venue, "MPLBACKEND": "agg"}
    if store is not None:
        chosen["HADAMARD_STORE"] = str(Path(store).expanduser().resolve())
    if folder is not None:
        chosen["HADAMARD_FIGURES"] = str(Path(folder).expanduser().resolve())
    for name in NOTEBOOKS:
        with (
            mock.patch.dict(os.environ, chosen),
            chdir(FOLDER),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),  # what notebooks print is for their readers
        ):
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__figures__")
        yield name


if __name__ == "__main__":
    sys.exit(main(["figures", *sys.argv[1:]]))  # the options and the errors are those of the command
