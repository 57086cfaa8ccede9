"""`run`: train one spec, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hadamard_toolkit.paths import cache_folder
from hadamard_toolkit.runs import environment
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.rescue import UnsavedRunError
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore, as_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hadamard_toolkit.adapters.attachment import Attachment
    from hadamard_toolkit.runs.fusion_sources import Sources
    from hadamard_toolkit.tasks.base import Task
    from hadamard_toolkit.training.features import FeatureStore
    from hadamard_toolkit.training.loop import Outcome
    from hadamard_toolkit.training.stages import OnStep


def run(
    spec: RunSpec, store: RunStore | str | Path | None = None, *, more: Mapping[str, Any] | None = None
) -> Run:
    """Train what `spec` says and return the finished run, `Run.attachment` included.

    An `AdapterFusion` has two phases: first the adapters of its `tasks`, each a run of its own with the same backbone,
    protocol and seed (found in the store or trained into it), then the fusion over them; see `fused.sources`.

    With a `store` (or its folder) the run is recorded there, and a run that is there already is read, not trained
    again; then `attachment` is None and `Run.restore` loads it. If that run was made from other content than lies here
    now under the names of its backbone and task, it is a `DataError`; `RunStore.outdated` lists such runs. A failure
    is recorded with its reason and raised. A store that cannot be written to is a `StoreError` before anything is
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


def _train(spec: RunSpec, store: RunStore | None = None) -> Run:
    from hadamard_toolkit.runs.fusion_sources import sources

    with sources(spec, store) as under:
        return _train_over(spec, under)


def _train_over(spec: RunSpec, under: Sources) -> Run:
    from hadamard_toolkit.training.loop import train

    environment.reset_peak_memory()
    begun = time.perf_counter()
    made = prepare(spec, under)
    outcome = train(
        made.attachment,
        made.task,
        made.tokenizer,
        replace(spec.protocol, pretraining=()),
        seed=spec.seed,
        feature_store=features_of_process(),
        on_step=made.on_step,
    )
    made.times["total"] = time.perf_counter() - begun
    return finished(made, outcome, under.record())


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


def finished(made: Prepared, outcome: Outcome, more: Mapping[str, Any]) -> Run:
    """The run that `outcome` makes of what was prepared; `more` goes into its `train_info`."""
    spec, task, attachment = made.spec, made.task, made.attachment
    info = {
        "rows": outcome.details["parts"],
        "run_info": {"started": made.started.isoformat(timespec="seconds"), "git": environment.git_state()},
        "train_info": {
            **_details(outcome),
            **_sparsity(attachment),
            **more,
            "peak_memory": environment.peak_memory(),
        },
        "meta_info": {
            **_meta(attachment),
            **made.made_from,
            **({"pretraining": made.pretraining} if made.pretraining else {}),
        },
    }
    return Run(
        spec=spec,
        metrics=outcome.metrics,
        headline=task.metric,
        history=pd.DataFrame(outcome.history),
        counts=attachment.count(),
        times={**outcome.times, **made.times},
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
    from hadamard_toolkit.training.features import FeatureStore

    return FeatureStore(folder)


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        times[name] = time.perf_counter() - begun


def _details(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in outcome.details.items() if name != "parts"}


def _sparsity(attachment: Attachment) -> dict[str, Any]:
    """How the masks came about and what they left; empty without masks."""
    from hadamard_toolkit.sparsity.masks import Masks

    if attachment.masking is None:
        return {}
    masks = Masks.of(attachment)
    made = {name: value for name, value in masks.provenance.items() if name != "adapter"}
    return {"sparsity": {**made, **masks.report()}}


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
