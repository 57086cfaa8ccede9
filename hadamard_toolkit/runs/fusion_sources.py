"""The first phase of a fusion in a run: adapters of single tasks, each trained by a run of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import ArgumentError, ToolkitError, UnsupportedError
from hadamard_toolkit.runs.record import ADAPTER, Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

if TYPE_CHECKING:
    from hadamard_toolkit.adapters.attachment import Attachment

KEPT = ".sources"  # of a store: weights that it does not keep itself but that fusions need; nothing breaks without it
POLL_SECONDS = 1.0  # while another process trains what we need


class SourceError(ToolkitError, RuntimeError):
    """A run that another one builds on failed."""


@dataclass(frozen=True)
class Source:
    """A finished run of a single task, the folder of its adapter, and whence these weights are."""

    run: Run
    folder: Path
    weights: str


@dataclass(frozen=True)
class Sources:
    """The adapters under a fusion by their names in it; none for every other adapter."""

    found: dict[str, Source]

    def load(self, attachment: Attachment) -> None:
        """Put them into an attached fusion."""
        from hadamard_toolkit.adapters.fusion import load_adapters

        if self.found:
            # the same files, but with a head of another kind they may come with a pooler or without
            folders = {task: source.folder for task, source in self.found.items()}
            load_adapters(attachment, folders, strict=False)

    def record(self) -> dict[str, Any]:
        """What run.json says of them, under `sources`: key, headline score and origin of the weights of each."""
        if not self.found:
            return {}
        return {
            "sources": {
                task: {"key": s.run.key, s.run.headline: s.run.score, "weights": s.weights}
                for task, s in self.found.items()
            }
        }


def source_specs(spec: RunSpec) -> dict[str, RunSpec]:
    """The runs that train the adapters under the fusion of `spec`, by their names in it; empty for other adapters.

    The names are tasks. Backbone, protocol and seed are those of `spec`, the adapter is the fusion's `single` one; what
    `spec` prunes are the fusion's own projections, so these are dense.
    """
    from hadamard_toolkit.adapters.fusion import AdapterFusion
    from hadamard_toolkit.adapters.stack import Stack
    from hadamard_toolkit.tasks.registry import canonical
    from hadamard_toolkit.training.pretraining_step import TASK

    fusion = spec.adapter
    if isinstance(fusion, Stack) and any(isinstance(part, AdapterFusion) for part in fusion.adapters):
        raise UnsupportedError(
            f"adapter={fusion} cannot be run from a spec: adapters of other runs are loaded into an AdapterFusion "
            "that stands alone; attach the stack and use ht.train"
        )
    if not isinstance(fusion, AdapterFusion):
        return {}
    if any(step.text == TASK for step in spec.protocol.pretraining):
        raise UnsupportedError(
            f"adapter={fusion} cannot be run after pretraining on text='task': each of its tasks would have another "
            "backbone; name the text, e.g. ContinuedPretraining(text='sst2')"
        )
    try:
        names = {task: canonical(task) for task in fusion.tasks}
    except ArgumentError as error:
        raise ArgumentError(
            f"tasks={fusion.tasks!r} of a fusion in a run spec must be tasks: {error}"
        ) from None
    if len(set(names.values())) < len(names):
        raise ArgumentError(f"tasks={fusion.tasks!r} of a fusion in a run spec name one task twice")
    return {
        task: replace(spec, task=name, adapter=fusion.single, sparsity=None) for task, name in names.items()
    }


@contextmanager
def sources(spec: RunSpec, store: RunStore | None) -> Iterator[Sources]:
    """The adapters under the fusion of `spec`: found in `store`, or trained now and recorded there.

    Weights that the store does not keep (`keep="vectors"`) are trained once and kept in its folder `.sources`, which
    may be deleted at any time; without a store, they are gone when the block ends. `SourceError` names a source that
    failed; the store has noted its reason, as for any run. `DataError` names one that was made from other content than
    lies here now.
    """
    needed = source_specs(spec)
    with tempfile.TemporaryDirectory(prefix="hadamard-") as folder:
        found = {}
        for place, (task, source) in enumerate(needed.items()):
            if store is not None and source in store:
                store.check_unchanged(source)
            try:
                found[task] = _source(source, store, Path(folder) / str(place))
            except Exception as error:
                raise SourceError(
                    f"adapter={spec.adapter} fuses the adapter of task {task!r}, and its run {source.key} failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
        yield Sources(found)


def _source(spec: RunSpec, store: RunStore | None, folder: Path) -> Source:
    """One of them; `folder` is where fresh weights go for now."""
    from accelerate import PartialState

    from hadamard_toolkit.runs.run import run

    if store is None:
        return _saved(run(spec), folder, "trained for this run")
    if PartialState().num_processes > 1:  # they train one run together, so none may wait for another
        return _kept(spec, store) or _train(spec, store, folder)
    while True:
        if known := _kept(spec, store):
            return known
        with store.claim(spec) as mine:
            if mine:
                return _kept(spec, store) or _train(spec, store, folder)
        time.sleep(POLL_SECONDS)


def _kept(spec: RunSpec, store: RunStore) -> Source | None:
    """The source from the files of the store, if the run is there, and its weights are."""
    if spec in store:
        for folder, weights in ((store.folder_of(spec.key), "store"), (store.folder / KEPT / spec.key, KEPT)):
            if (folder / ADAPTER).is_file():
                return Source(store.run(spec.key), folder, weights)
    return None


def _train(spec: RunSpec, store: RunStore, folder: Path) -> Source:
    """Train the source; its run is recorded unless it was there, without its weights."""
    from accelerate import PartialState

    from hadamard_toolkit.runs.run import run

    again = spec in store
    done = run(spec, None if again else store)
    if done.attachment is None:  # another process of this training has just written it
        return Source(done, store.folder_of(spec.key), "store")
    source = _saved(done, folder, "trained again" if again else "trained with this run")
    if PartialState().is_main_process and not store.has(spec.key, ADAPTER):
        done.attachment.save(store.folder / KEPT / spec.key)
    done.attachment = None  # with it goes a whole model
    return source


def _saved(done: Run, folder: Path, weights: str) -> Source:
    assert done.attachment is not None
    done.attachment.save(folder)
    return Source(done, folder, weights)
