"""Train what the notebooks show in the paper profile: `python tools/paper_runs.py notebooks/NN_name.py …`.

It comes before the notebooks are executed, which then find their runs in the store (`runs/paper`, or
`$HADAMARD_STORE`). So hours of training have one estimate and one line per finished run, use several processes or
GPUs, and go on where they were stopped. A notebook says itself what to train: its cells tagged `runs` are executed
here, and all the specs that they leave in a variable, a list or a dictionary are swept. `--dry-run` only says how
long that may take.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import jupytext

from hadamard_toolkit.cli import guarded
from hadamard_toolkit.cli_sweep import announce, do_sweep
from hadamard_toolkit.runs.engines import ENGINES
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.working import working_store

TAG = "runs"


def specs_of(script: Path) -> list[RunSpec]:
    """The specs that the cells of `script` tagged `runs` make, each once."""
    names: dict[str, Any] = {"__name__": script.stem}
    with chdir(script.parent), redirect_stdout(io.StringIO()):
        for cell in jupytext.read(script.name).cells:
            if cell.cell_type == "code" and TAG in cell.metadata.get("tags", []):
                exec(compile(cell.source, script.name, "exec"), names)
    return list(dict.fromkeys(spec for value in names.values() for spec in _specs_in(value)))


def _specs_in(value: object) -> Iterable[RunSpec]:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [spec for spec in held if isinstance(spec, RunSpec)]


def main() -> int:
    """Sweep the runs of all the scripts; failed ones are told, and the notebooks say what they lack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="+", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), default="processes")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    os.environ["HADAMARD_PROFILE"] = "paper"
    specs: list[RunSpec] = []
    for script in options.scripts:
        if found := specs_of(script):
            print(f"{script.name}: {len(found)} runs", flush=True)
            specs += found
    specs = list(dict.fromkeys(specs))
    store = working_store("paper")
    announce("notebooks in the paper profile", specs, store, options.engine, options.workers)
    if not options.dry_run:
        do_sweep(specs, store, options.engine, options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
