"""Make an executed notebook from its percent script: `python tools/build_notebook.py NN_name.py TARGET.ipynb`.

The script is the source; the result holds outputs and nothing that changes from run to run: no timestamps, widget
state, interpreter version or random cell ids.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # names a random model that is not stored
TIMEOUT = 3600  # seconds for one cell, but in the paper profile: its cells may train for as long as they need
QUIET = 15  # seconds without a sign of life


def read_script(script: Path) -> NotebookNode:
    """The notebook of a percent script: cells with source and tags only, ids drawn from their content."""
    notebook = jupytext.read(script)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = NotebookNode({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
    notebook.metadata = NotebookNode({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: NotebookNode, folder: Path, name: str = "") -> None:
    """Run every cell in a fresh kernel whose working folder is `folder`; an error in a cell, and Ctrl-C, are raised.

    A long run says every now and then which cell of `name` it has reached.
    """
    start = said = time.perf_counter()

    def report(cell_index: int, **_: object) -> None:
        nonlocal said
        if (now := time.perf_counter()) - said > QUIET:
            said = now
            reached = f"cell {cell_index + 1} of {len(notebook.cells)} done"
            print(f"{name}: {now - start:.0f} s, {reached}", flush=True)

    interrupted = False

    def stop_on_interrupt(**_: object) -> None:
        """In place of nbclient's own handler, which shows several tracebacks."""
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            nonlocal interrupted
            interrupted = True
            loop.set_exception_handler(lambda *_: None)  # nbclient's own tasks complain of the kernel's end
            task.cancel()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop)

    client = NotebookClient(
        notebook,
        timeout=None if os.environ.get("HADAMARD_PROFILE") == "paper" else TIMEOUT,
        kernel_name=KERNELSPEC["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_notebook_start=stop_on_interrupt,
        on_cell_complete=report,
        extra_arguments=[
            "--log-level=CRITICAL"
        ],  # else each kernel remarks that its local ports are not encrypted, and tells of every interrupt
    )
    try:
        client.execute()
    except (asyncio.CancelledError, Exception):  # whichever of all that hear the interrupt is the first
        if interrupted:
            raise KeyboardInterrupt from None
        raise


def tidy(notebook: NotebookNode) -> None:
    """Remove what the kernel wrote beside the outputs."""
    notebook.metadata = NotebookNode({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "metadata" in output:
                output.metadata = NotebookNode()


def build(script: Path, target: Path) -> None:
    """Execute `script` and write the notebook to `target`; one that failed goes to `build/failed` to be read."""
    notebook = read_script(script)
    try:
        execute(notebook, script.resolve().parent, script.name)
    except CellExecutionError:
        write(notebook, script.resolve().parent.parent / "build" / "failed" / target.name)
        raise
    write(notebook, target)


def write(notebook: NotebookNode, target: Path) -> None:
    """Write under a temporary name first, so that no reader sees half a notebook."""
    tidy(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    nbformat.write(notebook, temporary)
    os.replace(temporary, target)


def main() -> int:
    """Build one notebook; say how long it took, or which cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    # No progress bars in a stored output, and figures inline whatever the shell's backend is.
    os.environ["HADAMARD_PROGRESS"] = "0"
    os.environ.pop("MPLBACKEND", None)
    print(f"{arguments.script.name}: running", flush=True)
    start = time.perf_counter()
    try:
        build(arguments.script, arguments.target)
    except CellExecutionError as error:
        print(
            f"{arguments.script.name}: FAILED (outputs so far: build/failed/{arguments.target.name})\n{error}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{arguments.script.name}: interrupted; runs in a lasting store are kept", file=sys.stderr)
        return 130
    print(
        f"{arguments.script.name}: {time.perf_counter() - start:.0f} s, wrote {arguments.target}", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
