"""Runs of a sweep that are trained together, each recorded as its own: which fit, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import UnsupportedError, check_whole
from hadamard_toolkit.runs import environment
from hadamard_toolkit.runs.fusion_sources import Sources, source_specs
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import Prepared, Tasks, features_of_process, finished, prepare
from hadamard_toolkit.runs.spec import RunSpec, canonical_json

if TYPE_CHECKING:
    from hadamard_toolkit.adapters.attachment import Attachment

AUTO = "auto"
ON_GPU = 64  # runs at most; where memory does not suffice, a bank is halved
# Of each trained parameter of each run: value, gradient, two moments, the selected and the stored value, the value in
# the run's own model, and one temporary copy, in float32.
BYTES_PER_PARAMETER = 8 * 4
SHARED = ("head", "stage_one", "precision", "eval_batch_size", "max_length", "batch_size")


@dataclass(frozen=True)
class Bank:
    """Runs to be trained together; or a single one, with the reason where it is `refused` the company of others."""

    specs: tuple[RunSpec, ...]
    refused: str = ""


def check_bank_size(bank: int | str) -> None:
    """Raise `ArgumentError` unless `bank` is "auto" or a whole number of at least 1."""
    if bank != AUTO:
        check_whole("bank", bank, least=1)


def banks(specs: Iterable[RunSpec], bank: int | str, *, in_order: bool = False) -> list[Bank]:
    """`specs` in banks of at most `bank` runs that fit together, in the order of their first runs.

    A group that is too large for one bank is cut by task; or, with `in_order`, as its runs come, the first ones first.
    With "auto", the memory that is free on the GPU bounds the banks too.
    """
    import torch

    specs, most = list(specs), _most(bank)
    free = torch.cuda.mem_get_info()[0] if bank == AUTO and most > 1 else None
    groups: dict[Any, list[RunSpec]] = {}
    reasons: dict[Any, str] = {}
    for spec in specs:
        reason = refusal(spec) if most > 1 else ""
        key = spec if most == 1 or reason else kind_of(spec)
        groups.setdefault(key, []).append(spec)
        reasons[key] = reason
    result = []
    for key, group in groups.items():
        # Runs of one task have rows of like length, or the same rows.
        by_task = group if in_order else sorted(group, key=lambda spec: spec.task)
        size = most if free is None or len(group) == 1 else runs_in_memory(_trained(group[0]), free)
        for start in range(0, len(group), size):
            part = sorted(by_task[start : start + size], key=lambda spec: spec.task)
            result.append(Bank(tuple(part), reasons[key]))
    if in_order:
        place = {spec: number for number, spec in enumerate(specs)}
        result.sort(key=lambda bank: min(place[spec] for spec in bank.specs))
    return result


def _most(bank: int | str) -> int:
    """Runs in a bank. On a processor it gains little, and a run alone has the same bytes again."""
    import torch

    if isinstance(bank, int):
        return bank
    return ON_GPU if torch.cuda.is_available() else 1


def runs_in_memory(trained: int, free: int) -> int:
    """How many runs of `trained` parameters a bank has on a GPU with `free` bytes of memory: at most `ON_GPU`.

    Their parameters, `BYTES_PER_PARAMETER` each, may fill half of the memory; the other half is for activations.
    """
    return max(1, min(ON_GPU, free // 2 // (BYTES_PER_PARAMETER * max(1, trained))))


def _trained(spec: RunSpec) -> int:
    """The trained parameters of a run without its head; 0 where they cannot be counted, and the run will say why."""
    from transformers import AutoConfig

    from hadamard_toolkit.adapters.counting import parameter_counts
    from hadamard_toolkit.backbones import backbone_folder

    try:
        config = AutoConfig.from_pretrained(backbone_folder(spec.backbone), local_files_only=True)
        return int(parameter_counts({"": spec.adapter}, config)["trained"].iloc[0])
    except Exception:
        return 0


def refusal(spec: RunSpec) -> str:
    """Why this run cannot be part of a bank, as far as its spec tells; empty where nothing is known against it."""
    if spec.protocol.pretraining:
        return "its backbone is pretrained for it"
    if spec.sparsity is not None and spec.sparsity.when == "gradual":
        return "its masks change while it trains"
    if spec.protocol.frozen_prefix == "cached":
        return "its frozen prefix is cached, and a bank computes it"
    try:
        if source_specs(spec):
            return "it is made of other runs"
        if _about(spec.task)[0] == "span":
            return "a bank trains classification and regression, not spans"
    except Exception as error:  # the run itself will say so
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def _about(task: str) -> tuple[str, int, str]:
    from hadamard_toolkit.tasks.registry import load_task

    found = load_task(task)
    return found.kind, found.n_labels, found.head


def kind_of(spec: RunSpec) -> str:
    """What runs of one bank have in common."""
    from hadamard_toolkit.adapters.base import form_of

    plain = spec.to_dict()
    shared = {name: plain["protocol"].get(name) for name in SHARED}
    return canonical_json(
        [plain["backbone"], form_of(spec.adapter), list(_about(spec.task)), shared, spec.sparsity is not None]
    )


def run_bank(specs: Sequence[RunSpec]) -> list[Run | Exception]:
    """Train `specs` in one pass: the finished run of each, or what ended it.

    Raises `UnsupportedError` where they cannot be trained as a bank.
    """
    from hadamard_toolkit.training.bank import Member, train_bank

    environment.reset_peak_memory()
    tasks: Tasks = {}
    prepared: dict[int, Prepared] = {}
    results: dict[int, Run | Exception] = {}
    first: Prepared | None = None
    for index, spec in enumerate(specs):
        try:
            member = prepare(spec, Sources({}), tasks)
        except Exception as error:
            results[index] = error
            continue
        if member.on_step is not None:
            raise UnsupportedError("a bank cannot change masks while it trains")
        if first is None:
            first = member
        else:
            _share(member.attachment, first.attachment)
            member.tokenizer = first.tokenizer
        prepared[index] = member
    members = [
        Member(
            one.attachment, one.task, one.tokenizer, replace(one.spec.protocol, pretraining=()), one.spec.seed
        )
        for one in prepared.values()
    ]
    if members:
        outcomes = train_bank(members, feature_store=features_of_process())
        for (index, one), outcome in zip(prepared.items(), outcomes, strict=True):
            if isinstance(outcome, Exception):
                results[index] = outcome
                continue
            one.times["total"] = sum(one.times.values()) + sum(outcome.times.values())
            results[index] = finished(one, outcome, {})
    return [results[index] for index in range(len(specs))]


def _share(attachment: Attachment, other: Attachment) -> None:
    """Let `attachment` use the frozen parameters of `other` where they are equal, to save memory."""
    import torch

    own = {id(parameter) for parameter in attachment.parameters()}
    theirs = {id(parameter) for parameter in other.parameters()}
    named = other.model.named_parameters(remove_duplicate=False)
    frozen = {name: p for name, p in named if id(p) not in theirs}
    for path, module in attachment.model.named_modules():
        for key, parameter in module._parameters.items():
            same = frozen.get(f"{path}.{key}" if path else key)
            if parameter is None or same is None or id(parameter) in own:
                continue
            if parameter.shape == same.shape and torch.equal(parameter.to(same.device), same):
                module._parameters[key] = same
