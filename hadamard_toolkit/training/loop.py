"""`train`: one loop for every method, on the CPU, one GPU or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_range
from hadamard_toolkit.sites import position_limit
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.training.data import Data, Encoded, Features, check_ends
from hadamard_toolkit.training.evaluation import device_name, open_accelerator
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.features import without_backbone
from hadamard_toolkit.training.frozen_prefix import FrozenPrefix
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.stages import OnStep, Stage, TrainingState, put_back, snapshot, train_stage
from hadamard_toolkit.vocabulary import make_agree

ADAPTER_ROLES = ("adapter", "norm", "gate")


@dataclass(frozen=True)
class Outcome:
    """What training gave.

    Attributes
    ----------
    metrics: `{"validation": {...}, "test": {...}, …}` in natural units, with the mean `loss`.
    history: one row per epoch: `stage`, `epoch`, `step` and `learning_rate` (the last of the epoch), mean
        training `loss`, `seconds` of training, `eval_loss` and `eval_<metric>` on the validation rows.
    times: seconds of `features`, `stage_one`, `stage_two` and `evaluation`. A single stage counts as `stage_two`.
    predictions: logits [rows, outputs] of "validation" and every test split, in the order of `rows`; of a span task
        [rows, 4], see `question_answering.Spans`.
    labels: the true answers, row by row (of a span task where the first one starts and ends, in characters).
        rows: their positions in the split (ascending).
    answers: of a span task, per split the predicted answer of each question by its id, as SQuAD's official script
        reads it. scores: of a span task, per split each metric row by row.
    details: JSON-able facts: `head`, `stage_one` ("cached", "full" or None), `fallback` (why "cached" became "full"),
        `frozen_prefix` (how many layers were cached, where the protocol asks for that), `selected` (epoch of each
        stage), `parts` (rows and hash per part), `seed`, `device`, `processes`.
    """

    metrics: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    times: dict[str, float]
    predictions: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    details: dict[str, Any]
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def train(
    attachment: Attachment,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    seed: int = 0,
    feature_store: FeatureStore | None = None,
    encoded: Encoded | None = None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train `attachment` on `task` as `protocol` says, select on held-out rows, and evaluate on test once.

    `seed` fixes the rows, their order and the dropout; model and adapter were built under their own seeds. On the
    CPU, the same inputs give the same bytes. A `feature_store` shares between runs what is cached: the features of
    stage one and the hidden states of a frozen prefix; `encoded` shares tokenised rows between runs of one task,
    tokenizer and length. Afterwards the model is in evaluation mode, on the device it was trained on, and
    `requires_grad` marks what was trained in some stage. If anything fails, all weights and masks are as they were
    before. Masks that are on the attachment hold throughout; `on_step` (such as `GradualPruning`) is called after each
    step that trains the adapter.

    `protocol.pretraining` belongs before the adapter is attached: `run` sees to it, and by hand it is
    `continued_pretraining.adapt(model, …)`, `attach`, then `train` with a protocol without it.

    Raises `ArgumentError` for a head that does not fit the task, for more rows than there are and for a protocol with
    `pretraining`, `UnsupportedError` for parameters to train in half precision (the head and the norms of a backbone
    in bfloat16), `DataError` for a tokenizer that belongs to another model and for rows that a head which reads the end
    token cannot read, `TrainingError` for a loss that is not finite.
    """
    check(attachment, task, protocol, seed)
    make_agree(attachment.model, tokenizer)
    stages = stages_of(attachment, protocol)
    data = Data(task, tokenizer, protocol, seed, encoded)
    check_ends(attachment.model, tokenizer, data)
    accelerator = open_accelerator(protocol)
    attachment.model.to(accelerator.device)
    state = TrainingState(attachment, accelerator, protocol, data.kind, metrics_of(task), seed, on_step)
    store = feature_store or FeatureStore()
    details: dict[str, Any] = {"head": protocol.head, "stage_one": None, "fallback": None}
    with _all_or_nothing(attachment):
        texts: Data | FrozenPrefix = data
        if protocol.frozen_prefix == "cached" and stages[-1].name == "stage_two":
            attachment.train_only(*stages[-1].roles)
            texts = FrozenPrefix(state, data, store)
            details["frozen_prefix"] = texts.depth
        for stage in stages:
            rows: Data | Features | FrozenPrefix = texts
            context: AbstractContextManager[Any] = texts.running()
            if stage.name == "stage_one":
                rows = _rows_for_head(state, data, store, details)
                context = head_alone(attachment, cached=rows is not data)
            with context:
                _train_stage(state, stage, rows)
        attachment.train_only(*{role for stage in stages for role in stage.roles})
        predictions = _evaluate(state, rows)
    return finish(state, data, predictions, details)


def check(attachment: Attachment, task: Task, protocol: Protocol, seed: int) -> None:
    """Raise `ArgumentError` or `UnsupportedError` unless `attachment` can be trained on `task` as `protocol` says."""
    check_range("seed", seed, least=0)
    if protocol.pretraining:
        raise ArgumentError(
            f"pretraining={protocol.pretraining!r} is not allowed here, where the adapter is on the model already; use "
            "run(spec), or continued_pretraining.adapt(model, …) before attach and a protocol without pretraining"
        )
    _check_task(task, attachment)
    limit = attachment.longest_input()
    if limit is not None and protocol.max_length > limit:
        raise ArgumentError(
            f"max_length={protocol.max_length} is not allowed; this backbone reaches {limit} tokens"
            f"{' with this prompt' if limit != position_limit(attachment.model) else ''}"
        )
    _check_precision(attachment, stages_of(attachment, protocol))


def metrics_of(task: Task) -> tuple[str, ...]:
    """The metrics of `task`, the one that selects first."""
    return (task.metric, *(metric for metric in task.metrics if metric != task.metric))


def finish(
    state: TrainingState, data: Data, predictions: dict[str, np.ndarray], details: dict[str, Any]
) -> Outcome:
    """Score the predictions by part, and name the labels of the attachment."""
    state.attachment.name_labels(data.task.labels, data.task.name)
    rows = {name: data.rows(name) for name in predictions}
    by_row = {name: state.kind.by_row(logits, rows[name]) for name, logits in predictions.items()}
    return Outcome(
        metrics={
            name: state.kind.score(state.metrics, logits, rows[name]) for name, logits in predictions.items()
        },
        history=state.history,
        times=state.times,
        predictions=predictions,
        labels={name: state.kind.truth(rows[name]) for name in predictions},
        rows={name: data.parts[name].rows for name in predictions},
        details={
            **details,
            "selected": state.selected,
            "parts": {name: part.record() for name, part in data.parts.items()},
            "seed": state.seed,
            "device": device_name(state.accelerator),
            "processes": state.accelerator.num_processes,
        },
        answers={name: answers for name, (answers, _) in by_row.items() if answers},
        scores={name: scores for name, (_, scores) in by_row.items() if scores},
    )


def stages_of(attachment: Attachment, protocol: Protocol) -> list[Stage]:
    """The stages of `protocol` on `attachment`; a stage without parameters is left out.

    Raises `ArgumentError` when no stage is left.
    """
    rate, epochs = protocol.learning_rate, protocol.epochs
    if protocol.head == "first-then-frozen":
        stages = [
            Stage(1, "stage_one", ("head",), protocol.head_learning_rate, protocol.head_epochs),
            Stage(2, "stage_two", ADAPTER_ROLES, rate, epochs),
        ]
    elif protocol.head == "frozen-random":
        stages = [Stage(1, "stage_two", ADAPTER_ROLES, rate, epochs)]
    else:
        stages = [Stage(1, "stage_two", (*ADAPTER_ROLES, "head"), rate, epochs)]
    stages = [stage for stage in stages if any(attachment.parameters(role) for role in stage.roles)]
    if not stages:
        raise ArgumentError(f"head={protocol.head!r} with {attachment.adapter} leaves nothing to train")
    return stages


def head_alone(attachment: Attachment, *, cached: bool) -> AbstractContextManager[Any]:
    """Within it the model is as stage one trains it: the head on cached features, or on the bare backbone."""
    return without_backbone(attachment.model) if cached else attachment.enabled(False)


def _rows_for_head(
    state: TrainingState, data: Data, store: FeatureStore, details: dict[str, Any]
) -> Data | Features:
    """What stage one trains on; `details` record it."""
    details["stage_one"] = "full"
    if state.protocol.stage_one == "cached":
        try:
            features = Features(state, data, store)
        except UnsupportedError as error:
            details["fallback"] = str(error)
        else:
            details["stage_one"] = "cached"
            return features
    return data


def _train_stage(state: TrainingState, stage: Stage, rows: Data | Features | FrozenPrefix) -> None:
    validation = rows.source("validation") if "validation" in rows.parts else None
    train_stage(state, stage, rows.source("train"), validation)


def _evaluate(state: TrainingState, rows: Data | Features | FrozenPrefix) -> dict[str, np.ndarray]:
    """Predictions of the selected weights on validation and test, from what the last stage read."""
    model, size = state.attachment.model, state.protocol.eval_batch_size
    sources = {name: rows.source(name) for name in rows.parts if name != "train"}
    with state.timed("evaluation"), rows.running():
        return {
            name: state.kind.predict(state.accelerator, model, source, size)
            for name, source in sources.items()
        }


@contextmanager
def _all_or_nothing(attachment: Attachment) -> Iterator[None]:
    """Put weights, masks and `requires_grad` back if the block fails; leave the model in evaluation mode either way."""
    parameters = attachment.parameters()
    masking = attachment.masking
    masks = masking.state() if masking else {}
    before, required = snapshot(parameters), [p.requires_grad for p in parameters]
    try:
        yield
    except BaseException:
        put_back(parameters, before)
        if masking:
            masking.put_back(masks)
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        raise
    finally:
        attachment.model.eval()


def _check_task(task: Task, attachment: Attachment) -> None:
    outputs = attachment.model.config.num_labels
    target = "start_positions" if task.kind == "span" else "labels"
    if outputs != task.n_labels or target not in signature(attachment.model.forward).parameters:
        head = type(attachment.model).__name__
        raise ArgumentError(
            f"the model ({head}) has {outputs} outputs, but task {task.name!r} needs {task.n_labels} of a "
            f"{task.kind} head; load the backbone with labels={task.n_labels}, head={task.head!r}"
        )


def _check_precision(attachment: Attachment, stages: list[Stage]) -> None:
    """Half precision cannot represent AdamW's small steps, so whatever trains must be in float32."""
    roles = dict.fromkeys(role for stage in stages for role in stage.roles)
    half = {
        role: str(parameter.dtype).removeprefix("torch.")
        for role in roles
        for parameter in attachment.parameters(role)
        if parameter.dtype in (torch.bfloat16, torch.float16)
    }
    if half:
        raise UnsupportedError(
            f"the model's {' and '.join(half)} would train in {' and '.join(sorted(set(half.values())))}, where small "
            "steps are lost to rounding. Call model.float() first (precision='bf16' then computes in bfloat16 with "
            "parameters in float32), or train an adapter alone with head='frozen-random'"
        )
