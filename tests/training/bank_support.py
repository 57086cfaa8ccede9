"""Which methods train in a bank on which architecture: the second table of `docs/support.md`, computed.

Every adapter with its defaults trains for some steps in two stages, as a bank of two runs and each run alone: the
parameters are equal, or the bank is refused with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.runs.bank import refusal
from hadamard_toolkit.training.bank import Member, train_bank
from tests.adapters.support import NAMED, Notes, defaults
from tests.architectures import ARCHITECTURES
from tests.training.test_bank import SHORT, alone, member
from tests.training.test_question_answering import span_task

HEADER = """\
## In banks

What trains in one pass with other runs (`hadamard sweep --bank`). ✓: after nine steps in two stages, without dropout
and in double precision, the second of two runs, which have different seeds and rates, has the parameters that it gets
alone, to 1e-8. A number: such runs are trained alone, for this reason, which their records give as `bank_refused`.
"""
STEPS = dataclasses.replace(  # three in stage one, six in stage two; every third batch has one row
    SHORT,
    stage_one="full",
    head_epochs=1,
    epochs=2,
    train_rows=5,
    batch_size=2,
    validation_rows=0,
    test_rows=2,
    select="last",
    max_length=8,
)
TOLERANCE = 1e-8


def _spec(adapter: Adapter, sparsity: ht.Sparsity | None = None, **changes: object) -> ht.RunSpec:
    protocol = dataclasses.replace(SHORT, **changes)
    return ht.RunSpec("minilm-l6", "embedded/word-order", adapter, protocol, sparsity)


def _span() -> str:
    return str(_refused([member(task=span_task(8, 4))]))


ALONE: dict[str, Callable[[], str]] = {  # what no cell of the table shows
    "`AdapterFusion` in a sweep": lambda: refusal(_spec(ht.AdapterFusion(("sst2", "rte")))),
    "continued pretraining": lambda: refusal(_spec(ht.Hadamard(), pretraining=(ht.protocols.tapt(),))),
    'pruning with `when="gradual"`': lambda: refusal(
        _spec(ht.Pfeiffer(), ht.Sparsity("magnitude", 0.5, when="gradual"))
    ),
    "SQuAD, and other tasks of spans": _span,
}


def bank_methods() -> dict[str, Adapter]:
    """What the rows are called -> the adapter."""
    named = {NAMED.get(name, f"`{name}`"): adapter for name, adapter in defaults().items()}
    return named | {'`UniPELT(gated="masked")`': ht.UniPELT(gated="masked")}


def bank_column(architecture: str) -> dict[str, str | None]:
    """By method, why it does not train in a bank on this architecture; None where it does, as each run alone."""
    return {name: _observed(adapter, architecture) for name, adapter in bank_methods().items()}


def _observed(adapter: Adapter, architecture: str) -> str | None:
    def make(seed: int) -> Member:
        protocol = dataclasses.replace(STEPS, learning_rate=1e-3 * (seed + 1))
        one = member(adapter, protocol, seed=seed, architecture=architecture)
        one.attachment.model.double()
        return one

    try:
        banked = [make(seed) for seed in (0, 1)]
    except UnsupportedError as error:
        return str(error)
    if (reason := _refused(banked)) is not None:
        return reason
    single = make(1)
    alone(single)
    weights = banked[1].attachment.state_dict()
    for name, value in single.attachment.state_dict().items():
        gap = float((weights[name] - value).abs().max())
        assert gap <= TOLERANCE, f"{adapter} on {architecture}: {name} is off by {gap}"
    return None


def _refused(members: list[Member]) -> str | None:
    """Train a bank of these runs; the reason where it is refused."""
    try:
        outcomes = train_bank(members)
    except UnsupportedError as error:
        return str(error)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return None


def bank_table() -> str:
    """The part of `docs/support.md` on banks."""
    notes, columns = Notes(), {architecture: bank_column(architecture) for architecture in ARCHITECTURES}
    lines = [["method", *ARCHITECTURES], ["---", *[":-:"] * len(ARCHITECTURES)]]
    for method in bank_methods():
        reasons = [column[method] for column in columns.values()]
        lines.append([method, *("✓" if reason is None else notes.cite(reason) for reason in reasons)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    numbered = "\n".join(f"{number}. {reason}" for number, reason in enumerate(notes.reasons, start=1))
    others = "\n".join(f"- {situation}: {reason()}" for situation, reason in ALONE.items())
    return f"{HEADER}\n{table}\n\nReasons:\n\n{numbered}\n\nAlso trained alone:\n\n{others}\n"
