"""`run`: train one spec, once; what to do with a run that could not be stored, or whose weights were not."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import DataError, StoreError
from hadamard_toolkit.paths import cache_folder
from hadamard_toolkit.runs import environment
from hadamard_toolkit.runs.fusion_sources import Sources, sources
from hadamard_toolkit.runs.record import KEPT, Run
from hadamard_toolkit.runs.spec import RunSpec, canonical_json
from hadamard_toolkit.runs.store import RunStore, as_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hadamard_toolkit.adapters.attachment import Attachment
    from hadamard_toolkit.tasks.base import Task
    from hadamard_toolkit.training.data import Encoded
    from hadamard_toolkit.training.feature_store import FeatureStore
    from hadamard_toolkit.training.loop import Outcome
    from hadamard_toolkit.training.stages import OnStep

TOLERANCE = 1e-3  # of logits: another machine, another number of threads
POOLS = 16  # sets of tokenised rows that are kept of one task


class UnsavedRunError(StoreError):
    """The run was trained, but could not be written to its store. `run` holds it, trained attachment included."""

    def __init__(self, run: Run, store: RunStore, reason: BaseException) -> None:
        self.run, self.store = run, store
        super().__init__(
            f"the run {run.key} is trained, but could not be written to store={str(store.folder)!r} "
            f"({type(reason).__name__}: {reason}); the attribute `run` of this error holds it"
        )


def run(
    spec: RunSpec, store: RunStore | str | Path | None = None, *, more: Mapping[str, Any] | None = None
) -> Run:
    """Train what `spec` says and return the finished run, `Run.attachment` included.

    An `AdapterFusion` has two phases: first the adapters of its `tasks`, each a run of its own with the same backbone,
    protocol and seed (found in the store or trained into it), then the fusion over them; see `fusion_sources.sources`.

    With a `store` (or its folder) the run is recorded there, and a run that is there already is read, not trained
    again; then `attachment` is None and `Run.restore` loads it. `DataError` if that run was made from other content
    than is here now under the names of its backbone and task; `RunStore.outdated` lists such runs. A failure is
    recorded with its reason and raised. A store that cannot be written to is a `StoreError` before anything is
    trained; where writing fails later, the `UnsavedRunError` carries the trained run. `more` are facts for its
    `train_info`.

    The seed is set before anything is built: on one machine, with the same number of threads, the same spec gives
    the same bytes on the CPU.
    """
    from accelerate import PartialState

    if store is None:
        return _train(spec)
    store = as_store(store)
    spec = store.known(spec)
    if spec in store:
        store.check_unchanged(spec)
        return store.run(spec.key)
    store.check_writable()
    try:
        done = _train(spec, store)
    except Exception as error:
        store.add_failure(spec, error)
        raise
    done.info["train_info"] |= more or {}
    if PartialState().is_main_process:  # of several that train one run together, one records it
        record(done, store)
    return done


def record(done: Run, store: RunStore) -> None:
    """Write a trained run; `UnsavedRunError` carries it where that fails."""
    try:
        store.add(done)
    except Exception as error:  # a full disk has as many classes of error as there are writers
        raise UnsavedRunError(done, store, error) from error


def rescue(error: BaseException) -> Path | None:
    """Write the run that `error`, or a cause of it, carries into a new temporary folder; the run's folder there.

    None where there is no run to save, or nowhere to save it.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UnsavedRunError):
        cause = cause.__cause__
    if cause is None:
        return None
    try:
        folder = tempfile.mkdtemp(prefix="hadamard-unsaved-")
        return RunStore(folder, keep=cause.store.keep).add(cause.run).folder
    except Exception:  # the disk that is full may be the only one
        return None


def live(stored: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Attachment]:
    """A stored run as a working model: (model, tokenizer, attachment), with its stored weights.

    Where the store has not kept them, the run is trained again in memory. Its test logits must then equal the stored
    ones to 1e-3, as they do on the machine that made them; otherwise a `DataError` says how far off they are.
    """
    from hadamard_toolkit.backbones import load_backbone

    if stored.info["run_info"]["weights"] == KEPT:
        return stored.restore()
    again = run(stored.spec)
    assert again.attachment is not None
    for name in ("logits", "score"):
        if name in stored.predictions["test"]:
            expected, repeated = stored.predictions["test"][name], again.predictions["test"][name]
            off = (
                float(np.abs(repeated - expected).max()) if expected.shape == repeated.shape else float("inf")
            )
            if not off <= TOLERANCE:
                raise DataError(
                    f"run {stored.key} was trained again and came out otherwise (test {name} differ by up to "
                    f'{off:.2g}); repeat it with RunStore(folder, keep="adapters"), which keeps its weights'
                )
    _, tokenizer = load_backbone(stored.spec.backbone, labels=stored.info["meta_info"]["task"]["labels"])
    return again.attachment.model, tokenizer, again.attachment


def _train(spec: RunSpec, store: RunStore | None = None) -> Run:
    with sources(spec, store, train=run) as under:
        return _train_over(spec, under)


def _train_over(spec: RunSpec, under: Sources) -> Run:
    from hadamard_toolkit.training.loop import train

    environment.reset_peak_memory()
    begun = time.perf_counter()
    prepared = prepare(spec, under)
    outcome = train(
        prepared.attachment,
        prepared.task,
        prepared.tokenizer,
        replace(spec.protocol, pretraining=()),
        seed=spec.seed,
        feature_store=features_of_process(),
        encoded=_encoded_of_process(prepared),
        on_step=prepared.on_step,
    )
    prepared.times["total"] = time.perf_counter() - begun
    return finished(prepared, outcome, under.record())


@dataclass
class Prepared:
    """A run up to its training."""

    spec: RunSpec
    task: Task
    tokenizer: PreTrainedTokenizerBase
    attachment: Attachment
    on_step: OnStep | None
    made_from: dict[str, Any]
    pretraining: list[dict[str, Any]]
    started: datetime
    times: dict[str, float]


Tasks = dict[str, "tuple[Task, dict[str, str]]"]


def prepare(spec: RunSpec, under: Sources, tasks: Tasks | None = None) -> Prepared:
    """Load, attach and prune what `spec` says; `tasks` holds those that were loaded before, with their content."""
    from accelerate.utils import set_seed

    from hadamard_toolkit.adapters.attachment import attach
    from hadamard_toolkit.backbones import backbone_provenance, load_backbone
    from hadamard_toolkit.tasks.registry import load_task
    from hadamard_toolkit.training.continued_pretraining import adapt
    from hadamard_toolkit.training.pruning import prune_for_run

    started, times = datetime.now(UTC), {"load": 0.0}
    with _timed(times, "load"):
        set_seed(spec.seed)
        tasks = {} if tasks is None else tasks
        if spec.task not in tasks:
            loaded = load_task(spec.task)
            tasks[spec.task] = loaded, loaded.content()
        task, content = tasks[spec.task]
        model, tokenizer = load_backbone(spec.backbone, labels=task.n_labels, head=task.head, seed=spec.seed)
        made_from = {
            "backbone": backbone_provenance(spec.backbone),
            "task": {
                "head": task.head,
                "labels": task.n_labels,
                **task.provenance,
                "label_names": list(task.labels),
                "metric": task.metric,
                "content": content,
            },
        }
    pretraining: list[dict[str, Any]] = []
    if spec.protocol.pretraining:
        with _timed(times, "pretraining"):
            pretraining = adapt(model, spec.backbone, task, spec.protocol.pretraining)
            set_seed(spec.seed)  # the same state whether it was done or found
    attachment = attach(model, spec.adapter, seed=spec.seed)
    under.load(attachment)
    on_step = None
    if spec.sparsity is not None:
        with _timed(times, "sparsify"):
            attachment, on_step = prune_for_run(
                attachment, spec.sparsity, task, tokenizer, spec.protocol, seed=spec.seed
            )
            under.load(attachment)  # again: it may be a new one (the control with other initial weights)
    return Prepared(spec, task, tokenizer, attachment, on_step, made_from, pretraining, started, times)


def finished(prepared: Prepared, outcome: Outcome, more: Mapping[str, Any]) -> Run:
    """The run that `outcome` makes of what was prepared; `more` goes into its `train_info`."""
    attachment = prepared.attachment
    info = {
        "rows": outcome.details["parts"],
        "run_info": {
            "started": prepared.started.isoformat(timespec="seconds"),
            "git": environment.git_state(),
        },
        "train_info": {
            **{name: value for name, value in outcome.details.items() if name != "parts"},
            **_sparsity(attachment),
            **_basis(attachment),
            **more,
            "peak_memory": environment.peak_memory(),
        },
        "meta_info": {
            **_meta(attachment),
            **prepared.made_from,
            **({"pretraining": prepared.pretraining} if prepared.pretraining else {}),
        },
    }
    return Run(
        spec=prepared.spec,
        metrics=outcome.metrics,
        headline=prepared.task.metric,
        history=pd.DataFrame(outcome.history),
        counts=attachment.count(),
        times={**outcome.times, **prepared.times},
        info=info,
        predictions=_predictions(outcome),
        answers=outcome.answers,
        attachment=attachment,
    )


def features_of_process() -> FeatureStore:
    """One per process, so that runs of other seeds and methods find the features of stage one in memory."""
    return _features(cache_folder() / "features")


@cache
def _features(folder: Path) -> FeatureStore:
    from hadamard_toolkit.training.feature_store import FeatureStore

    return FeatureStore(folder)


def _encoded_of_process(prepared: Prepared) -> Encoded:
    """What runs of the same backbone, task and length have tokenised in this process."""
    protocol, made_from = prepared.spec.protocol, prepared.made_from
    about = [made_from["backbone"], made_from["task"]["content"], prepared.task.text_columns]
    encoded = _encoded(canonical_json([*about, protocol.max_length, protocol.stride]))
    if len(encoded) > POOLS:
        encoded.clear()
    return encoded


@lru_cache(maxsize=4)
def _encoded(made_from: str) -> Encoded:
    return {}


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        times[name] = time.perf_counter() - begun


def _sparsity(attachment: Attachment) -> dict[str, Any]:
    """How the masks came about and what they left; empty without masks."""
    from hadamard_toolkit.sparsity.masks import Masks

    if attachment.masking is None:
        return {}
    masks = Masks.of(attachment)
    made = {name: value for name, value in masks.provenance.items() if name != "adapter"}
    return {"sparsity": {**made, **masks.report()}}


def _basis(attachment: Attachment) -> dict[str, Any]:
    """How the basis of a subspace was made; empty for other adapters."""
    from hadamard_toolkit.adapters.bases import load_basis
    from hadamard_toolkit.adapters.subspace import Subspace

    adapter = attachment.adapter
    return {"basis": load_basis(adapter.basis).made} if isinstance(adapter, Subspace) else {}


def _meta(attachment: Attachment) -> dict[str, Any]:
    parameter = next(attachment.model.parameters())
    return {
        "versions": environment.versions(),
        "system": environment.system(),
        "device": {
            **environment.describe_device(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
    }


def _predictions(outcome: Outcome) -> dict[str, dict[str, np.ndarray]]:
    """Per split what was predicted, the true answers and the positions of the rows in their split; see `Run`."""
    return {
        split: {
            **_predicted(predicted, outcome.scores.get(split)),
            "labels": outcome.labels[split],
            "rows": outcome.rows[split],
        }
        for split, predicted in outcome.predictions.items()
    }


def _predicted(predicted: np.ndarray, scores: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Logits in float32; of a span task the place and score of each answer, for its logits would fill a disk."""
    if scores is None:
        return {"logits": np.asarray(predicted, np.float32)}
    by_row = {name: np.asarray(values, np.float32) for name, values in scores.items()}
    return {
        "span": predicted[:, :2].astype(np.int32),
        "score": np.asarray(predicted[:, 2], np.float32),
        **by_row,
    }
