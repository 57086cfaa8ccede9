"""`train_bank`: many runs over one frozen backbone in one pass.

Runs that share backbone, adapter and head shape differ in a few numbers only. Their parameters are stacked, the frozen
ones are shared, and `torch.func.vmap` turns the model's own forward pass into one for all of them, whatever the method.
Each run keeps its own rows and their order, dropout, clipping, schedule, weight decay, early stopping, selection and
masks; one that is done leaves, and the batch shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.gates import Gate
from hadamard_toolkit.errors import ToolkitError, UnsupportedError
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.training.bank_stage import Bank, Part, StageOfBank, predict
from hadamard_toolkit.training.bank_state import Forward, Table
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.evaluation import open_accelerator
from hadamard_toolkit.training.features import FeatureStore, feature_source, without_backbone
from hadamard_toolkit.training.loop import (
    ADAPTER_ROLES,
    Data,
    Features,
    Known,
    Outcome,
    check,
    check_ends,
    finish,
    kind_of,
    metrics_of,
    plan,
)
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.splits import draw
from hadamard_toolkit.training.stages import Run, Stage
from hadamard_toolkit.vocabulary import make_agree

SHARED = (
    "head",
    "stage_one",
    "precision",
    "eval_batch_size",
    "max_length",
)  # fields of protocols that must be equal
PROBE_ROWS = 4
TOLERANCE = 1e-3  # largest difference between a run's logits in the bank and alone, relative to their size


@dataclass(frozen=True)
class Member:
    """One run of a bank: what `train` takes for it."""

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
    `times` are each run's share of the common time, and `details["bank"]` says how many runs there were.

    Raises `UnsupportedError` where these members cannot be trained as a bank; then nothing was changed.
    """
    members, outcomes = list(members), dict[int, Outcome | Exception]()
    fitting = []
    for index, member in enumerate(members):
        try:
            check(member.attachment, member.task, member.protocol, member.seed)
            draw(member.task.splits, member.protocol, member.seed)
            plan(member.attachment, member.protocol)
            fitting.append(index)
        except ToolkitError as error:
            outcomes[index] = error
    if fitting:
        found = _train([members[index] for index in fitting], feature_store or FeatureStore())
        outcomes |= dict(zip(fitting, found, strict=True))
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
    shapes = {name: p.shape for name, p in first.attachment.named_parameters().items()}
    if len({p.dtype for p in first.attachment.parameters()}) > 1:
        raise UnsupportedError("a bank trains parameters of one type only")
    if any(isinstance(module, Gate) and module.mode == "original" for module in model.modules()):
        raise UnsupportedError(
            "gated='original' takes means over padding too, and a bank pads all its runs to one length; "
            "gated='masked' can be trained in a bank"
        )
    frozen = _frozen(first.attachment)
    for member in members[1:]:
        other = member.attachment
        for field_ in SHARED:
            own, wanted = getattr(member.protocol, field_), getattr(first.protocol, field_)
            if own != wanted:
                raise UnsupportedError(
                    f"the runs of a bank need the same {field_}, not {wanted!r} and {own!r}"
                )
        if other.model.config.problem_type != model.config.problem_type:
            raise UnsupportedError("the runs of a bank need heads of the same kind")
        if other.adapter != first.attachment.adapter or member.task.kind != first.task.kind:
            raise UnsupportedError("the runs of a bank need the same adapter and kind of task")
        if {name: p.shape for name, p in other.named_parameters().items()} != shapes:
            raise UnsupportedError("the runs of a bank need parameters of the same shapes")
        if type(other.model) is not type(model) or not _same(frozen, _frozen(other)):
            raise UnsupportedError("the runs of a bank need the same backbone")


def _frozen(attachment: Attachment) -> dict[str, Tensor]:
    own = {id(parameter) for parameter in attachment.parameters()}
    return {name: p for name, p in attachment.model.named_parameters() if id(p) not in own}


def _same(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        value is those[name] or torch.equal(value.to(those[name].device), those[name])
        for name, value in these.items()
    )


def _train(members: list[Member], store: FeatureStore) -> list[Outcome | Exception]:
    check_bank(members)
    accelerator = open_accelerator(members[0].protocol)
    if accelerator.num_processes > 1:
        raise UnsupportedError("a bank trains in one process; several share the rows of one run")
    plans = [plan(member.attachment, member.protocol) for member in members]
    template = members[0].attachment
    with _flags_put_back(template) as keep_flags:
        bank = _open(members, accelerator)
        details: dict[str, Any] = {"head": members[0].protocol.head, "stage_one": None, "fallback": None}
        texts, features = _texts(bank), None
        _check_forward(bank, texts)
        for stages in zip(*plans, strict=True):
            if stages[0].name == "stage_one":
                features = _train_heads(bank, stages, texts, store, details)
            else:
                features = None
                _train_stage(bank, stages, texts)
        predictions = _evaluate(bank, texts, features)
        if 0 not in bank.failed:
            keep_flags()
    outcomes: list[Outcome | Exception] = []
    for index in range(len(members)):
        if index in bank.failed:
            outcomes.append(bank.failed[index])
            continue
        _hand_over(bank, index, {role for stage in plans[index] for role in stage.roles})
        own = {**details, "bank": len(members)}
        outcomes.append(finish(bank.runs[index], bank.data[index], predictions[index], own))
    return outcomes


@contextmanager
def _flags_put_back(template: Attachment) -> Iterator[Callable[[], None]]:
    """Put `requires_grad` of the template back after the block, unless what this yields is called in it."""
    flags = [(parameter, parameter.requires_grad) for parameter in template.parameters()]
    try:
        yield flags.clear
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        template.model.eval()


def _open(members: list[Member], accelerator: Accelerator) -> Bank:
    runs, data, known = [], [], dict[Any, Known]()
    for tokenizer in {id(member.tokenizer): member.tokenizer for member in members}.values():
        make_agree(members[0].attachment.model, tokenizer)
    for member in members:
        kind = kind_of(member.task, member.tokenizer, member.protocol)
        metrics = metrics_of(member.task)
        runs.append(Run(member.attachment, accelerator, member.protocol, kind, metrics, member.seed))
        texts = known.setdefault((id(member.tokenizer), tuple(member.task.text_columns)), {})
        data.append(Data(member.task, kind, draw(member.task.splits, member.protocol, member.seed), texts))
        check_ends(member.attachment.model, member.tokenizer, data[-1])
    device, template = accelerator.device, members[0].attachment
    template.model.to(device)
    own = _once(template.named_parameters())
    states = [member.attachment.named_parameters() for member in members]
    values = {name: torch.stack([state[name].detach().to(device) for state in states]) for name in own}
    masks = [masking.kept if (masking := member.attachment.masking) else {} for member in members]
    removed = {
        name: torch.stack(
            [
                ~mask[name] if name in mask else torch.zeros(parameter.shape, dtype=torch.bool)
                for mask in masks
            ]
        ).to(device)
        for name, parameter in own.items()
        if any(name in mask for mask in masks)
    }
    return Bank(runs, data, accelerator, Forward(template.model, own), values, removed)


def _once(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Each tensor under the first of its names."""
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    return {name: parameter for name, parameter in parameters.items() if first[id(parameter)] == name}


class _Rows:
    """The rows of all runs on the device, as text or as features: a table for each part, made when it is needed.

    `pool(index, split)` gives the rows of a split that run `index` may need; runs that share a pool share its rows.
    """

    def __init__(self, bank: Bank, pool: Callable[[int, str], Source]) -> None:
        self.bank, self._pool = bank, pool
        self._tables: dict[tuple[int, ...], Table] = {}

    def part(self, name: str) -> Part | None:
        """Part `name` of the runs that have it, or None where no run has."""
        data = self.bank.data
        sources = {
            index: self._pool(index, data[index].parts[name].split)
            for index in self.bank.alive
            if name in data[index].parts
        }
        if not sources:
            return None
        distinct = {id(source): source for source in sources.values()}
        if tuple(distinct) not in self._tables:
            rows = list(distinct.values())
            self._tables[tuple(distinct)] = Table(rows, self.bank.accelerator.device)
        starts = np.cumsum([0, *(len(source.rows) for source in distinct.values())])
        begin = dict(zip(distinct, starts.tolist(), strict=False))
        places = {index: begin[id(source)] + data[index].places(name) for index, source in sources.items()}
        return Part(self._tables[tuple(distinct)], places)


def _texts(bank: Bank) -> _Rows:
    sources: dict[int, Source] = {}

    def pool(index: int, split: str) -> Source:
        _, examples = bank.data[index].pool(split)
        if id(examples) not in sources:
            sources[id(examples)] = bank.runs[index].kind.source(examples)
        return sources[id(examples)]

    return _Rows(bank, pool)


def _features(bank: Bank, store: FeatureStore) -> _Rows:
    sources: dict[int, Source] = {}

    def pool(index: int, split: str) -> Source:
        _, examples = bank.data[index].pool(split)
        if id(examples) not in sources:
            run = replace(bank.runs[index], attachment=bank.template)
            vectors, labels = Features(run, bank.data[index], store).pool(split)
            sources[id(examples)] = feature_source(bank.template.model, vectors, labels)
        return sources[id(examples)]

    return _Rows(bank, pool)


def _train_heads(
    bank: Bank, stages: Sequence[Stage], texts: _Rows, store: FeatureStore, details: dict[str, Any]
) -> _Rows | None:
    """Stage one on the bare backbone. Returns the features it used, if it used any."""
    features: _Rows | None = None
    if bank.runs[0].protocol.stage_one == "cached":
        features = _features(bank, store)
        try:
            features.part("train"), features.part("validation")
        except UnsupportedError as error:
            features, details["fallback"] = None, str(error)
    details["stage_one"] = "full" if features is None else "cached"
    bare = bank.template.enabled(False) if features is None else without_backbone(bank.template.model)
    with bare:
        _train_stage(bank, stages, features or texts, head_alone=True)
    return features


def _train_stage(bank: Bank, stages: Sequence[Stage], rows: _Rows, *, head_alone: bool = False) -> None:
    training = rows.part("train")
    if training is not None:  # None: no run is alive
        StageOfBank(bank, stages, training, rows.part("validation"), head_alone=head_alone).train()


def _evaluate(bank: Bank, texts: _Rows, features: _Rows | None) -> dict[int, dict[str, np.ndarray]]:
    """Predictions of the selected weights on validation and test, by run; from features where heads alone trained."""
    adapted = any(bank.template.parameters(role) for role in ADAPTER_ROLES)
    rows = texts if features is None or adapted else features
    names = list(dict.fromkeys(name for data in bank.data for name in data.parts if name != "train"))
    found: dict[int, dict[str, np.ndarray]] = {index: {} for index in bank.alive}
    parts = {name: rows.part(name) for name in names}
    begun = time.perf_counter()
    with nullcontext() if rows is texts else without_backbone(bank.template.model):
        for name, part in parts.items():
            if part is None:
                continue
            values = bank.of(list(part.places), bank.values)
            predicted = predict(bank, values, part.table, list(part.places.values()))
            for index, own in zip(part.places, predicted, strict=True):
                found[index][name] = own
    for index in bank.alive:
        bank.runs[index].times["evaluation"] += (time.perf_counter() - begun) / len(bank.alive)
    return found


def _check_forward(bank: Bank, texts: _Rows) -> None:
    """Raise `UnsupportedError` unless a pass of the bank gives the logits that the model gives each run alone."""
    part = texts.part("train")
    assert part is not None
    here = sorted({0, len(bank.runs) - 1})
    places = np.stack([part.places[index][np.arange(PROBE_ROWS) % len(part.places[index])] for index in here])
    inputs, _ = part.table.take(places)
    values = bank.of(here, bank.values)
    bank.template.model.eval()
    with torch.no_grad():
        try:
            together = bank.forward(values, inputs)
        except (RuntimeError, ToolkitError) as error:
            why = str(error).partition("\n")[0]
            raise UnsupportedError(
                f"{type(bank.template.model).__name__} cannot run as a bank: {why}"
            ) from error
        alone = torch.stack(
            [
                bank.forward.alone(
                    {name: value[row] for name, value in values.items()},
                    {name: value[row] for name, value in inputs.items()},
                )
                for row in range(len(here))
            ]
        )
    gap = float((together - alone).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(alone.abs().max())):
        raise UnsupportedError(
            f"{type(bank.template.model).__name__} as a bank is off by {gap:.1e} from each run alone"
        )


@torch.no_grad()
def _hand_over(bank: Bank, index: int, roles: set[str]) -> None:
    """The trained weights to the attachment of the run."""
    attachment = bank.runs[index].attachment
    attachment.model.to(bank.accelerator.device)
    parameters = attachment.named_parameters()
    for name, values in bank.values.items():
        parameters[name].copy_(values[index])
    attachment.train_only(*roles)
    attachment.model.eval()
