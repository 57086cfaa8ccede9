"""The pruner as an app of its own: pick a run, prune it. `hadamard pruner` opens it through Voilà."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import ArgumentError, DataError, MissingExtraError, ToolkitError
from hadamard_toolkit.runs.store import RunStore

if TYPE_CHECKING:
    import ipywidgets as widgets

NOTEBOOK = Path(__file__).with_name("pruner_app.ipynb")
STORE, RUN, RETRAINED = "HADAMARD_STORE", "HADAMARD_RUN", "HADAMARD_RETRAINED"
FIGURES = "HADAMARD_FIGURES"
LEFT = 300  # seconds without a page after which a kernel ends
_EMPTY = "—"


def prunable(store: RunStore) -> pd.DataFrame:
    """Runs of a store that can be pruned, a row each, `words` being what a menu says. `DataError` if there are none."""
    table = store.load()
    shown = table[table["headline"] & (table["split"] == "test") & (table["trained"] > 0)]
    weights = shown["key"].map(lambda key: store.has(key, "adapter_model.safetensors"))
    shown = shown[weights.astype(bool)].sort_values(["task", "label", "seed", "key"])
    if shown.empty:
        raise DataError(
            f"{store.folder} holds no run whose weights were kept; `hadamard run --store DIR` makes one"
        )
    named = shown["backbone"].nunique() > 1
    listed: list[dict[Any, Any]] = shown.to_dict("records")
    words = [
        f"{row['task']}, {Path(row['backbone']).name + ', ' if named else ''}{row['label']}, seed {row['seed']}, "
        f"{row['train_rows']:,} rows: test {row['metric']} {row['value']:.3f} ({row['key'][:6]})"
        for row in listed
    ]
    return shown.assign(words=words)


def to_begin_with(shown: pd.DataFrame) -> str:
    """The key of the run to open first: on an embedded task if possible, then of the most frequent kind of run."""
    tried = [-shown.groupby(name)["key"].transform("size") for name in ("backbone", "task", "label")]
    elsewhere = ~shown["task"].str.startswith("embedded/")
    first = np.lexsort([*reversed(tried), elsewhere])[0]  # the last key counts most; stable
    return str(shown["key"].iloc[first])


def pruner_app(store: str | Path | None = None, run: str | None = None, **options: Any) -> widgets.VBox:
    """A menu of the runs in `store`, and the pruner of the one chosen (or of two, side by side).

    `store` and `run` (a key, or how it begins) come from the environment variables `HADAMARD_STORE` and
    `HADAMARD_RUN` where they are left out, as `hadamard pruner` sets them; so do the folders of retrained runs
    (`HADAMARD_RETRAINED`) and of figures (`HADAMARD_FIGURES`).
    """
    import ipywidgets as widgets

    from hadamard_toolkit.widgets.views import message

    folder = Path(store or os.environ.get(STORE) or "runs")
    options.setdefault("store", os.environ.get(RETRAINED) or "runs")
    options.setdefault("figures", os.environ.get(FIGURES) or "figures")
    place = widgets.VBox()
    try:
        source = RunStore(folder)
        shown = prunable(source)
        menu = list(zip(shown["words"], shown["key"], strict=True))
        key = run or os.environ.get(RUN)
        first = source.run(key).key if key else to_begin_with(shown)
        if first not in set(shown["key"]):
            raise ArgumentError(f"run={key!r} is not allowed: its weights were not kept")
    except ToolkitError as error:
        place.children = [widgets.HTML(message(str(error), error=True))]
        return place
    choose = widgets.Dropdown(
        options=menu,
        value=first,
        description="Run",
        layout={"width": "900px", "max_width": "96%"},
    )
    beside = widgets.Dropdown(
        options=[(_EMPTY, ""), *menu],
        value="",
        description="Beside it",
        layout={"width": "900px", "max_width": "96%"},
    )

    def show(_: object = None) -> None:
        for child in place.children[2:]:
            child.close()
        keys = list(dict.fromkeys(key for key in (choose.value, beside.value) if key))
        place.children = [choose, beside, widgets.HTML("<p>Loading…</p>")]
        place.children = [choose, beside, _pruner_of(source, keys, options)]

    for control in (choose, beside):
        control.observe(show, "value")
    show()
    return place


def _pruner_of(source: RunStore, keys: list[str], options: dict[str, Any]) -> widgets.Widget:
    import ipywidgets as widgets

    from hadamard_toolkit.widgets.pruner import LayerPruner
    from hadamard_toolkit.widgets.views import message

    try:
        return LayerPruner([source.run(key) for key in keys], **options)
    except (ToolkitError, OSError) as error:
        return widgets.HTML(message(str(error), error=True))


def serve(
    store: str | Path,
    run: str | None = None,
    *,
    retrained: str | Path | None = None,
    port: int | None = None,
    browser: bool = True,
    theme: str = "light",
    call: Callable[[list[str], dict[str, str]], int] | None = None,
) -> int:
    """Open the app in a browser until it is interrupted, through Voilà on this machine alone; Voilà's exit status.

    `call` starts a command in an environment (default: this process becomes it, where the system lets it).
    """
    if find_spec("voila") is None:
        raise MissingExtraError(
            "`hadamard pruner` needs Voilà; install it with: pip install hadamard_toolkit[notebooks]"
        )
    source = RunStore(store)
    prunable(source)
    # a Voilà kernel works in the folder of the notebook, so all paths are absolute
    places = {
        STORE: source.folder,
        RETRAINED: Path(retrained or os.environ.get(RETRAINED) or "runs"),
        FIGURES: Path(os.environ.get(FIGURES) or "figures"),
    }
    environment = {
        **os.environ,
        **{name: str(place.expanduser().resolve()) for name, place in places.items()},
    }
    environment.pop(RUN, None)
    if run is not None:
        environment[RUN] = source.run(run).key
    command = [sys.executable, "-m", "voila", str(NOTEBOOK), f"--theme={theme}", "--Voila.ip=127.0.0.1"]
    # A page that is closed asks for the end of its kernel, but not every browser gets to say so. An open page keeps its
    # kernel, however idle.
    command += [
        f"--MappingKernelManager.cull_idle_timeout={LEFT}",
        f"--MappingKernelManager.cull_interval={LEFT // 5}",
        "--MappingKernelManager.cull_connected=False",
    ]
    command += [] if port is None else [f"--port={port}"]
    command += [] if browser else ["--no-browser"]
    return (call or _become)(command, environment)


def _become(command: list[str], environment: dict[str, str]) -> int:
    """Whoever ends this process then ends the server, and not its parent alone."""
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    return subprocess.call(command, env=environment)
