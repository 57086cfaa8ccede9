"""The first phase of a fusion in a run: adapters of single tasks, each trained by a run of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import ArgumentError, ToolkitError, UnsupportedError
from hadamard_toolkit.runs.record import ADAPTER, Run
from hadamard_toolkit.runs.shelf import SOURCES
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

if TYPE_CHECKING:
    from hadamard_toolkit.adapters.attachment import Attachment

Train = Callable[[RunSpec, RunStore | None], Run]
POLL_SECONDS = 1.0  # while another process trains what we need


class SourceError(ToolkitError, RuntimeError):
    """A run that another one builds on failed."""


@dataclass(frozen=True)
class Source:
    """A finished run of a single task, the folder of its adapter, and where its weights come from, in words."""

    run: Run
    folder: Path
    weights: str


@dataclass(frozen=True)
class Sources:
    """The adapters under a fusion by their names in it; none for every other adapter."""

    by_task: dict[str, Source]

    def load(self, attachment: Attachment) -> None:
        """Load them into an attached fusion."""
        from hadamard_toolkit.adapters.fusion import load_adapters

        if self.by_task:
            folders = {task: source.folder for task, source in self.by_task.items()}
            # not strict: with a head of another kind, the same backbone has a pooler or has none
            load_adapters(attachment, folders, strict=False)

    def record(self) -> dict[str, Any]:
        """What run.json says of them, under `sources`: key, headline score and origin of the weights of each."""
        if not self.by_task:
            return {}
        return {
            "sources": {
                task: {"key": s.run.key, s.run.headline: s.run.score, "weights": s.weights}
                for task, s in self.by_task.items()
            }
        }


def source_specs(spec: RunSpec) -> dict[str, RunSpec]:
    """The runs that train the adapters under the fusion of `spec`, by their names in it; empty for other adapters.

    The names are tasks. Backbone, protocol and seed are those of `spec`, the adapter is the fusion's `single` one. They
    are dense: what `spec` prunes are the fusion's own projections.
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
def sources(spec: RunSpec, store: RunStore | None, *, train: Train) -> Iterator[Sources]:
    """The adapters under the fusion of `spec`: found in `store`, or trained now by `train` and recorded there.

    `train(spec, store)` gives a finished run, as `runs.run.run` does. Weights that the store does not keep
    (`keep="vectors"`) are trained once and kept in its folder `.sources`, which may be deleted at any time; without a
    store, they are gone when the block ends. `SourceError` names a source that failed; the store has noted its reason,
    as for any run. `DataError` names one that was made from other content than is here now.
    """
    needed = source_specs(spec)
    with tempfile.TemporaryDirectory(prefix="hadamard-") as folder:
        by_task = {}
        for number, (task, source) in enumerate(needed.items()):
            if store is not None and source in store:
                store.check_unchanged(source)
            try:
                by_task[task] = _source(source, store, Path(folder) / str(number), train)
            except Exception as error:
                raise SourceError(
                    f"adapter={spec.adapter} fuses the adapter of task {task!r}, and its run {source.key} failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
        yield Sources(by_task)


def _source(spec: RunSpec, store: RunStore | None, folder: Path, train: Train) -> Source:
    """One of them, from the store if it is there; fresh weights go into `folder`."""
    from accelerate import PartialState

    if store is None:
        return _saved(train(spec, None), folder, "trained for this run")
    if PartialState().num_processes > 1:  # they train one run together, so none may wait for another
        return _kept(spec, store) or _trained(spec, store, folder, train)
    while True:
        if known := _kept(spec, store):
            return known
        with store.claim(spec) as claimed:
            if claimed:
                return _kept(spec, store) or _trained(spec, store, folder, train)
        time.sleep(POLL_SECONDS)


def _kept(spec: RunSpec, store: RunStore) -> Source | None:
    """The source from the files of the store, if the run and its weights are there."""
    if spec in store:
        kept = store.folder / SOURCES / spec.key
        for folder, weights in ((store.folder_of(spec.key), "store"), (kept, SOURCES)):
            if (folder / ADAPTER).is_file():
                return Source(store.run(spec.key), folder, weights)
    return None


def _trained(spec: RunSpec, store: RunStore, folder: Path, train: Train) -> Source:
    """Train the source; its run is recorded unless it was there, without its weights."""
    from accelerate import PartialState

    again = spec in store
    done = train(spec, None if again else store)
    if done.attachment is None:  # another process of this training has just written it
        return Source(done, store.folder_of(spec.key), "store")
    source = _saved(done, folder, "trained again" if again else "trained with this run")
    if PartialState().is_main_process and not store.has(spec.key, ADAPTER):
        done.attachment.save(store.folder / SOURCES / spec.key)
    done.attachment = None  # with it goes a whole model
    return source


def _saved(done: Run, folder: Path, weights: str) -> Source:
    assert done.attachment is not None
    done.attachment.save(folder)
    return Source(done, folder, weights)
