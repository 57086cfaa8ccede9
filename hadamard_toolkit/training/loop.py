"""`train`: one loop for every method, on the CPU, one GPU or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError, check_range
from hadamard_toolkit.sites import position_limit
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.evaluation import device_name, open_accelerator
from hadamard_toolkit.training.features import FeatureStore, feature_source, head_features, without_backbone
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.question_answering import Spans
from hadamard_toolkit.training.splits import Part, draw
from hadamard_toolkit.training.stages import OnStep, Run, Stage, put_back, snapshot, train_stage
from hadamard_toolkit.training.task_types import Kind, Labelled
from hadamard_toolkit.vocabulary import make_agree

ADAPTER_ROLES = ("adapter", "norm", "gate")
WHOLE_SPLIT = (
    0.25  # share of a split from which features are computed for all of it, so that other seeds find theirs
)


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
        [rows, 4], see `spans.Spans`.
    labels: the true answers, row by row (of a span task where the first one starts and ends, in characters).
        rows: their positions in the split (ascending).
    answers: of a span task, per split the predicted answer of each question by its id, as SQuAD's official script
        reads it. scores: of a span task, per split each metric row by row.
    details: JSON-able facts: `head`, `stage_one` ("cached", "full" or None), `fallback` (why "cached" became "full"),
        `selected` (epoch of each stage), `parts` (rows and hash per part), `seed`, `device`, `processes`.
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
    on_step: OnStep | None = None,
) -> Outcome:
    """Train `attachment` on `task` as `protocol` says, select on held-out rows, and evaluate on test once.

    `seed` fixes the rows, their order and the dropout; model and adapter were built under their own seeds. On the
    CPU, the same inputs give the same bytes. A `feature_store` shares the features of stage one between runs.
    Afterwards the model is in evaluation mode, on the device it was trained on, and `requires_grad` marks what was
    trained in some stage. If anything fails, all weights and masks are as they were before. Masks that are on the
    attachment hold throughout; `on_step` (such as `GradualPruning`) is called after each step that trains the adapter.

    `protocol.pretraining` belongs before the adapter is attached: `run` sees to it, and by hand it is
    `continued.adapt(model, …)`, `attach`, then `train` with a protocol without it.

    Raises `ArgumentError` for a head that does not fit the task, for more rows than there are and for a protocol with
    `pretraining`, `UnsupportedError` for parameters to train in half precision (the head and the norms of a backbone
    in bfloat16), `DataError` for a tokenizer that belongs to another model and for rows that a head which reads the end
    token cannot read, `TrainingError` for a loss that is not finite.
    """
    check(attachment, task, protocol, seed)
    make_agree(attachment.model, tokenizer)
    stages = plan(attachment, protocol)
    kind = kind_of(task, tokenizer, protocol)
    data = Data(task, kind, draw(task.splits, protocol, seed))
    check_ends(attachment.model, tokenizer, data)
    accelerator = open_accelerator(protocol)
    attachment.model.to(accelerator.device)
    run = Run(attachment, accelerator, protocol, kind, metrics_of(task), seed, on_step)
    with _all_or_nothing(attachment):
        details: dict[str, Any] = {"head": protocol.head, "stage_one": None, "fallback": None}
        sources = None
        for stage in stages:
            if stage.name == "stage_one":
                sources = _train_head(run, stage, data, feature_store or FeatureStore(), details)
            else:
                sources = None
                train_stage(run, stage, data.source("train"), data.source_of_validation())
        attachment.train_only(*{role for stage in stages for role in stage.roles})
        predictions = _evaluate(run, data, sources)
    return finish(run, data, predictions, details)


def check(attachment: Attachment, task: Task, protocol: Protocol, seed: int) -> None:
    """Raise `ArgumentError` or `UnsupportedError` unless `attachment` can be trained on `task` as `protocol` says."""
    check_range("seed", seed, least=0)
    if protocol.pretraining:
        raise ArgumentError(
            f"pretraining={protocol.pretraining!r} is not allowed here, where the adapter is on the model already; use "
            "run(spec), or continued.adapt(model, …) before attach and a protocol without pretraining"
        )
    _check_task(task, attachment)
    limit = attachment.longest_input()
    if limit is not None and protocol.max_length > limit:
        raise ArgumentError(
            f"max_length={protocol.max_length} is not allowed; this backbone reaches {limit} tokens"
            f"{' with this prompt' if limit != position_limit(attachment.model) else ''}"
        )
    _check_precision(attachment, plan(attachment, protocol))


def metrics_of(task: Task) -> tuple[str, ...]:
    """The metrics of `task`, the one that selects first."""
    return (task.metric, *(m for m in task.metrics if m != task.metric))


def finish(run: Run, data: Data, predictions: dict[str, np.ndarray], details: dict[str, Any]) -> Outcome:
    """What a run leaves behind, scored."""
    run.attachment.name_labels(data.task.labels, data.task.name)
    rows = {name: data.rows(name) for name in predictions}
    by_row = {name: run.kind.by_row(predicted, rows[name]) for name, predicted in predictions.items()}
    return Outcome(
        metrics={
            name: run.kind.score(run.metrics, predicted, rows[name])
            for name, predicted in predictions.items()
        },
        history=run.history,
        times=run.times,
        predictions=predictions,
        labels={name: run.kind.truth(rows[name]) for name in predictions},
        rows={name: data.parts[name].rows for name in predictions},
        details={
            **details,
            "selected": run.selected,
            "parts": {name: part.record() for name, part in data.parts.items()},
            "seed": run.seed,
            "device": device_name(run.accelerator),
            "processes": run.accelerator.num_processes,
        },
        answers={name: answers for name, (answers, _) in by_row.items() if answers},
        scores={name: scores for name, (_, scores) in by_row.items() if scores},
    )


def kind_of(task: Task, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Kind:
    """What is particular to the kind of `task`."""
    if task.kind == "span":
        return Spans(task.text_columns, tokenizer, protocol)
    return Labelled(task.text_columns, tokenizer, protocol)


def plan(attachment: Attachment, protocol: Protocol) -> list[Stage]:
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


Known = dict[
    tuple[int, bytes], Any
]  # rows that were tokenised before, by the identity of their split and their places


class Data:
    """The rows of a run, tokenised when they are first needed and once.

    Runs on the same splits, with tokenizers and lengths that are the same, may share what is `known`.
    """

    def __init__(self, task: Task, kind: Kind, parts: dict[str, Part], known: Known | None = None) -> None:
        self.task, self.kind, self.parts = task, kind, parts
        self._tokenised: dict[str, tuple[np.ndarray, Any]] = {}
        self._known = {} if known is None else known

    def pool(self, split: str) -> tuple[np.ndarray, Any]:
        """The rows of `split` that any part uses (all of them when that is a good share), and their tokens."""
        if split not in self._tokenised:
            used = np.unique(
                np.concatenate([part.rows for part in self.parts.values() if part.split == split])
            )
            rows = self.task.splits[split]
            if not split.startswith("test") and len(used) >= WHOLE_SPLIT * len(rows):
                used = np.arange(len(rows))
            key = id(rows), used.tobytes()
            if key not in self._known:
                self._known[key] = self.kind.encode(rows if len(used) == len(rows) else rows.select(used))
            self._tokenised[split] = used, self._known[key]
        return self._tokenised[split]

    def places(self, name: str) -> np.ndarray:
        """Where the rows of part `name` are in the pool of their split."""
        part = self.parts[name]
        return np.searchsorted(self.pool(part.split)[0], part.rows)

    def rows(self, name: str) -> Any:
        """The tokenised rows of part `name`."""
        return self.pool(self.parts[name].split)[1].select(self.places(name))

    def source(self, name: str) -> Source:
        """Part `name` as text for the whole model."""
        return self.kind.source(self.rows(name))

    def source_of_validation(self) -> Source | None:
        """The validation rows, if the protocol holds any out."""
        return self.source("validation") if "validation" in self.parts else None


def check_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Raise `DataError` for rows without an end token, or with more than others, where the head reads the last one.

    It does in encoder-decoder models, which need as many of them in every row.
    """
    end = getattr(model.config, "eos_token_id", None)
    if not model.config.is_encoder_decoder or data.task.kind == "span" or end is None:
        return
    usual, token = None, tokenizer.convert_ids_to_tokens(end)
    for split in dict.fromkeys(part.split for part in data.parts.values()):
        rows, examples = data.pool(split)
        counts = [ids.count(end) for ids in examples.inputs["input_ids"]]
        usual = min(counts) if usual is None else usual
        for row, count in zip(rows.tolist(), counts, strict=True):
            where = f"task {data.task.name!r}, split {split!r}, row {row} has"
            head = f"the head of {type(model).__name__}"
            if not count:
                raise DataError(
                    f"{where} no end token {token!r}, which {head} reads: the tokenizer should put one behind every row"
                )
            if count != usual:
                raise DataError(
                    f"{where} {count} end tokens {token!r} where others have {usual}, and {head} needs as many in "
                    "every row: take it out of the text"
                )


class Features:
    """The rows of a run as cached features, computed for the pool of a split when a part of it is first needed."""

    def __init__(self, run: Run, data: Data, store: FeatureStore) -> None:
        self.run, self.data, self.store = run, data, store

    def source(self, name: str) -> Source:
        """Part `name` for the head alone, inside `without_backbone`."""
        part = self.data.parts[name]
        vectors, labels = self.pool(part.split)
        places = self.data.places(name)
        return feature_source(self.run.attachment.model, vectors[places], labels[places])

    def pool(self, split: str) -> tuple[Tensor, np.ndarray]:
        """Features and labels of all rows of `split` that are at hand; `data.places` says where those of a part are."""
        run = self.run
        if not run.kind.cacheable:
            raise UnsupportedError(
                f"a head for {self.data.task.kind} tasks reads every token, so it cannot train on cached features"
            )
        _, examples = self.data.pool(split)
        with run.timed("features"):
            vectors = head_features(
                run.attachment,
                examples,
                run.kind.collate,
                run.accelerator,
                run.protocol.eval_batch_size,
                self.store,
            )
        return vectors, examples.labels


def _train_head(
    run: Run, stage: Stage, data: Data, store: FeatureStore, details: dict[str, Any]
) -> Features | None:
    """Stage one on the bare backbone. Returns the features it used, if it used any."""
    features = None
    if run.protocol.stage_one == "cached":
        features = Features(run, data, store)
        try:
            training = features.source("train")
            validation = features.source("validation") if "validation" in data.parts else None
        except UnsupportedError as error:
            features, details["fallback"] = None, str(error)
    details["stage_one"] = "full" if features is None else "cached"
    if features is not None:
        with without_backbone(run.attachment.model):
            train_stage(run, stage, training, validation)
        return features
    with run.attachment.enabled(False):
        train_stage(run, stage, data.source("train"), data.source_of_validation())
    return None


def _evaluate(run: Run, data: Data, features: Features | None) -> dict[str, np.ndarray]:
    """Predictions of the selected weights on validation and test; from features where the head alone was trained."""
    names = [name for name in data.parts if name != "train"]
    model, size = run.attachment.model, run.protocol.eval_batch_size
    if features is None or any(run.attachment.parameters(role) for role in ADAPTER_ROLES):
        with run.timed("evaluation"):
            return {name: run.kind.predict(run.accelerator, model, data.source(name), size) for name in names}
    sources = {name: features.source(name) for name in names}
    with run.timed("evaluation"), without_backbone(model):
        return {
            name: run.kind.predict(run.accelerator, model, source, size) for name, source in sources.items()
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
    """AdamW's steps are smaller than what half precision can tell apart: what would train so must be in float32."""
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
