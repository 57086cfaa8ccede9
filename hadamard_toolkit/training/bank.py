"""`train_bank`: many runs over one frozen backbone in one pass.

Runs that share backbone, adapter and head shape differ in a few numbers only. Their parameters are stacked, the frozen
ones are shared, and `torch.func.vmap` turns the model's own forward pass into one for all of them, whatever the method.
Each run keeps its own rows and their order, dropout, clipping, schedule, weight decay, early stopping, selection and
masks; a run that is done leaves, and the batch shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.base import form_of
from hadamard_toolkit.adapters.gates import reads_padding
from hadamard_toolkit.errors import ToolkitError, UnsupportedError
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.training.bank_rows import BankRows
from hadamard_toolkit.training.bank_stage import BankStage
from hadamard_toolkit.training.bank_state import BankState, Forward, select
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.data import Data, Encoded, Features
from hadamard_toolkit.training.evaluation import open_accelerator
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.features import feature_source, without_backbone
from hadamard_toolkit.training.loop import (
    ADAPTER_ROLES,
    Outcome,
    check,
    finish,
    head_alone,
    metrics_of,
    stages_of,
)
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.splits import draw
from hadamard_toolkit.training.stages import TrainingState
from hadamard_toolkit.vocabulary import make_agree

# Fields of protocols that must be equal.
SHARED = ("head", "stage_one", "precision", "eval_batch_size", "max_length")
PROBE_ROWS = 4
TOLERANCE = 1e-3  # largest difference between a run's logits in the bank and alone, relative to their size


@dataclass(frozen=True)
class Member:
    """One run of a bank: the arguments that `train` takes for it."""

    attachment: Attachment
    task: Task
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    seed: int = 0


def train_bank(
    members: Sequence[Member], *, feature_store: FeatureStore | None = None
) -> list[Outcome | Exception]:
    """Train all `members` in one pass; the outcome of each, or the error that ended it, in their order.

    The members have the same adapter on models of their own that share the backbone's values and the shape of the head.
    Their protocols agree in `SHARED`. Apart from rounding, and from the dropout that is drawn, each is trained as
    `train` would train it alone: its attachment holds the trained weights afterwards, or its old ones if it failed.
    `times` are each run's share of the common time, and `details["bank"]` is the number of runs.

    Raises `UnsupportedError` where these members cannot be trained as a bank; then nothing was changed.
    """
    outcomes: dict[int, Outcome | Exception] = {}
    for index, member in enumerate(members):
        try:
            check(member.attachment, member.task, member.protocol, member.seed)
            draw(member.task.splits, member.protocol, member.seed)
        except ToolkitError as error:
            outcomes[index] = error
    valid = [index for index in range(len(members)) if index not in outcomes]
    if valid:
        trained = _train([members[index] for index in valid], feature_store or FeatureStore())
        outcomes |= dict(zip(valid, trained, strict=True))
    return [outcomes[index] for index in range(len(members))]


def check_bank(members: Sequence[Member]) -> None:
    """Raise `UnsupportedError` with the reason unless `members` can be trained as a bank."""
    first = members[0]
    model = first.attachment.model
    if first.task.kind == "span":
        raise UnsupportedError("a bank trains classification and regression, not spans")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"the head of {type(model).__name__} looks for end tokens in a way that a bank cannot"
        )
    if next(model.parameters()).device.type == "meta":
        raise UnsupportedError("a bank needs weights, and this model is on the meta device")
    if len({parameter.dtype for parameter in first.attachment.parameters()}) > 1:
        raise UnsupportedError("a bank trains parameters of one type only")
    if any(member.protocol.frozen_prefix == "cached" for member in members):
        raise UnsupportedError(
            "a bank computes the layers below its adapters in every pass, dropout included"
        )
    if reads_padding(model):
        raise UnsupportedError(
            "gated='original' takes means over padding too, and a bank pads all its runs to one length; "
            "gated='masked' can be trained in a bank"
        )
    for member in members[1:]:
        for name in SHARED:
            value, shared = getattr(member.protocol, name), getattr(first.protocol, name)
            if value != shared:
                raise UnsupportedError(
                    f"the runs of a bank need the same {name}, not {shared!r} and {value!r}"
                )
        one, other = first.attachment, member.attachment
        same_adapter = form_of(other.adapter) == form_of(one.adapter) and member.task.kind == first.task.kind
        same_head = other.model.config.problem_type == model.config.problem_type
        for fits, what in (
            (same_head, "heads of the same kind"),
            (same_adapter, "the same adapter and kind of task"),
            (_shapes(one) == _shapes(other), "parameters of the same shapes"),
            (_same_backbone(one, other), "the same backbone"),
        ):
            if not fits:
                raise UnsupportedError(f"the runs of a bank need {what}")


def _shapes(attachment: Attachment) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in attachment.named_parameters().items()}


def _same_backbone(one: Attachment, other: Attachment) -> bool:
    these, those = _frozen(one), _frozen(other)
    return (
        type(one.model) is type(other.model)
        and these.keys() == those.keys()
        and all(
            value is those[name] or torch.equal(value.to(those[name].device), those[name])
            for name, value in these.items()
        )
    )


def _frozen(attachment: Attachment) -> dict[str, Tensor]:
    trained = {id(parameter) for parameter in attachment.parameters()}
    return {name: p for name, p in attachment.model.named_parameters() if id(p) not in trained}


def _train(members: list[Member], store: FeatureStore) -> list[Outcome | Exception]:
    check_bank(members)
    accelerator = open_accelerator(members[0].protocol)
    if accelerator.num_processes > 1:
        raise UnsupportedError("a bank trains in one process; several share the rows of one run")
    stages_by_run = [stages_of(member.attachment, member.protocol) for member in members]
    details: dict[str, Any] = {"head": members[0].protocol.head, "stage_one": None, "fallback": None}
    with _template_restored(members[0].attachment):
        bank = _open(members, accelerator)
        texts = BankRows(
            bank.data,
            accelerator.device,
            lambda index, split: bank.runs[index].kind.source(bank.data[index].pool(split)[1]),
        )
        _check_forward(bank, texts)
        for stages in zip(*stages_by_run, strict=True):
            rows = texts
            context: AbstractContextManager[Any] = nullcontext()
            if stages[0].name == "stage_one":
                rows = _rows_for_heads(bank, texts, store, details)
                context = head_alone(bank.template, cached=rows is not texts)
            training, validation = (rows.part(name, bank.alive) for name in ("train", "validation"))
            if training is not None:
                with context:
                    BankStage(bank, stages, training, validation).train()
        predictions = _evaluate(bank, texts, rows)
    outcomes: list[Outcome | Exception] = []
    for index, of_run in enumerate(stages_by_run):
        if index in bank.failed:
            outcomes.append(bank.failed[index])
            continue
        _hand_over(bank, index, {role for stage in of_run for role in stage.roles})
        own = details | {"bank": len(members)}
        outcomes.append(finish(bank.runs[index], bank.data[index], predictions[index], own))
    return outcomes


@contextmanager
def _template_restored(template: Attachment) -> Iterator[None]:
    """Put `requires_grad` and evaluation mode back after the block."""
    required = [(parameter, parameter.requires_grad) for parameter in template.parameters()]
    try:
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        template.model.eval()


def _open(members: list[Member], accelerator: Accelerator) -> BankState:
    template, device = members[0].attachment, accelerator.device
    for tokenizer in {id(member.tokenizer): member.tokenizer for member in members}.values():
        make_agree(template.model, tokenizer)
    template.model.to(device)
    runs, data, encoded = [], [], dict[Any, Encoded]()
    for member in members:
        attachment, task, protocol, seed = member.attachment, member.task, member.protocol, member.seed
        shared = encoded.setdefault((id(member.tokenizer), id(task)), {})
        data.append(Data(task, member.tokenizer, protocol, seed, shared))
        runs.append(TrainingState(attachment, accelerator, protocol, data[-1].kind, metrics_of(task), seed))
    # A tied tensor counts once, under the first of its names.
    first_names = {id(p): name for name, p in reversed(template.named_parameters().items())}
    parameters = {name: p for name, p in template.named_parameters().items() if first_names[id(p)] == name}
    states = [member.attachment.named_parameters() for member in members]
    masks = [masking.kept if (masking := member.attachment.masking) else {} for member in members]
    values, removed = {}, {}
    for name, parameter in parameters.items():
        values[name] = torch.stack([state[name].detach().to(device) for state in states])
        if any(name in kept for kept in masks):
            nothing = torch.zeros(parameter.shape, dtype=torch.bool)
            removed[name] = torch.stack([~kept[name] if name in kept else nothing for kept in masks]).to(
                device
            )
    return BankState(runs, data, accelerator, Forward(template.model, parameters), values, removed)


def _rows_for_heads(
    bank: BankState, texts: BankRows, store: FeatureStore, details: dict[str, Any]
) -> BankRows:
    """What stage one trains on; `details` record it."""
    details["stage_one"] = "full"
    if bank.runs[0].protocol.stage_one != "cached":
        return texts
    by_run: dict[int, Features] = {}

    def as_source(index: int, split: str) -> Source:
        if index not in by_run:
            state = replace(bank.runs[index], attachment=bank.template)
            by_run[index] = Features(state, bank.data[index], store)
        return feature_source(bank.template.model, *by_run[index].pool(split))

    features = BankRows(bank.data, bank.accelerator.device, as_source)
    try:
        features.part("train", bank.alive)
        features.part("validation", bank.alive)
    except UnsupportedError as error:
        details["fallback"] = str(error)
        return texts
    details["stage_one"] = "cached"
    return features


def _evaluate(bank: BankState, texts: BankRows, rows: BankRows) -> dict[int, dict[str, np.ndarray]]:
    """Predictions of the selected weights on validation and test, by run; from features if heads alone were trained."""
    if any(bank.template.parameters(role) for role in ADAPTER_ROLES):
        rows = texts
    names = dict.fromkeys(name for data in bank.data for name in data.parts if name != "train")
    parts = {name: rows.part(name, bank.alive) for name in names}
    predictions: dict[int, dict[str, np.ndarray]] = {index: {} for index in bank.alive}
    started = time.perf_counter()
    with nullcontext() if rows is texts else without_backbone(bank.template.model):
        for name, part in parts.items():
            if part is not None:
                runs = list(part.positions)
                logits = bank.predict(select(bank.values, runs, bank.values), part, runs)
                for index, of_run in zip(runs, logits, strict=True):
                    predictions[index][name] = of_run
    for index in bank.alive:
        bank.runs[index].times["evaluation"] += (time.perf_counter() - started) / len(bank.alive)
    return predictions


def _check_forward(bank: BankState, texts: BankRows) -> None:
    """Raise `UnsupportedError` unless a pass of the bank gives the logits that the model gives each run alone."""
    name = type(bank.template.model).__name__
    runs = sorted({0, len(bank.runs) - 1})
    part = texts.part("train", runs)
    assert part is not None
    positions = np.stack([np.resize(part.positions[index], PROBE_ROWS) for index in runs])
    inputs, _ = part.table.take(positions)
    values = select(bank.values, runs, bank.values)
    bank.template.model.eval()
    with torch.no_grad():
        try:
            together = bank.forward(values, inputs)
        except (RuntimeError, ToolkitError) as error:
            raise UnsupportedError(
                f"{name} cannot run as a bank: {str(error).partition(chr(10))[0]}"
            ) from error
        for row, logits in enumerate(together):
            alone = bank.forward.alone(
                {name: value[row] for name, value in values.items()},
                {name: value[row] for name, value in inputs.items()},
            )
            gap = float((logits - alone).abs().max())
            if not gap <= TOLERANCE * max(1.0, float(alone.abs().max())):
                raise UnsupportedError(f"{name} as a bank is off by {gap:.1e} from each run alone")


@torch.no_grad()
def _hand_over(bank: BankState, index: int, roles: set[str]) -> None:
    """Copy the trained weights to the attachment of the run."""
    attachment = bank.runs[index].attachment
    attachment.model.to(bank.accelerator.device)
    parameters = attachment.named_parameters()
    for name, values in bank.values.items():
        parameters[name].copy_(values[index])
    attachment.train_only(*roles)
    attachment.model.eval()
