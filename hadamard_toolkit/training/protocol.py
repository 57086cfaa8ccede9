"""Every training choice in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hadamard_toolkit.errors import ArgumentError, check_choice, check_fields, check_number, check_whole
from hadamard_toolkit.training.pretraining_step import PRECISIONS, ContinuedPretraining, read_steps

HEAD_POLICIES = ("trained", "frozen-random", "first-then-frozen")
STAGE_ONE = ("cached", "full")
FROZEN_PREFIX = ("computed", "cached")
SCHEDULES = ("linear", "constant")
SELECTIONS = ("best", "last")
# Fields added after the first records. They are written only if they differ from the default, so that keys stay.
LATER: dict[str, Any] = {"stride": None, "pretraining": (), "frozen_prefix": "computed"}


@check_fields
@dataclass(frozen=True)
class Protocol:
    """How an attachment is trained; the same for every method, so that methods can be compared.

    Parameters
    ----------
    head: the head policy. `"trained"`: one stage, head and adapter together. `"frozen-random"`: one stage, the
        head stays as it was initialised. `"first-then-frozen"`: stage one trains the head alone on the bare
        backbone, stage two freezes it and trains the adapter (Chen et al. 2023).
    learning_rate, epochs: of the stage that trains the adapter.
    head_learning_rate, head_epochs: of stage one of `"first-then-frozen"`.
    stage_one: `"cached"` trains the head on features that the backbone computes once, in evaluation mode;
        `"full"` sends every batch through the backbone with its dropout on.
    batch_size: rows per update, over all processes. eval_batch_size: the same without gradients;
        batches of 32 hold less padding than the default, with which a CPU takes 1.1 to 1.5 times as long.
    max_length: tokens per row; longer rows are truncated.
    weight_decay: AdamW's, on matrices only (never on vectors, norms or biases).
    warmup: share of the steps of a stage with a rising learning rate. schedule: what follows, `"linear"` (to
        zero; Hugging Face's "polynomial" of power 1) or `"constant"`.
    clip: largest gradient norm, or None. betas, epsilon: AdamW's.
    patience: epochs without improvement on the validation rows before a stage stops, or None.
    select: `"best"` keeps the weights of the best epoch on the validation rows (a higher metric, or the same
        metric at a lower loss), `"last"` those of the last epoch. The test split never selects anything.
    train_rows: K, rows drawn from the training split with the seed of the run; None takes all that are left.
    validation_rows: rows held out of the training split with the seed of the run. A task with a validation split
        of its own gives that many rows of it instead. None: a tenth of the training split but at most 1,000
        rows, or the whole of the task's own validation split.
    test_rows: evaluate on that many test rows only, the same for every seed; the result then says "subset".
    precision: `"fp32"` or `"bf16"` (autocast; the parameters stay float32).
    stride: span tasks only: tokens that two neighbouring windows over a long context share (`doc_stride` of the
        usual scripts). None is a third of `max_length`.
    pretraining: steps of continued pretraining, done in this order before the adapter is attached; see
        `ContinuedPretraining`, `protocols.dapt` and `protocols.tapt`.
    frozen_prefix: how the layers below the lowest trained one run while the adapter trains. `"computed"`: in every
        step, with their dropout on. `"cached"`: once per text, in evaluation mode; all epochs, evaluations and other
        runs of the process with the same backbone and rows reuse their hidden states. Dropout is then off below the
        adapter, so the two give different scores. An adapter in layer 0, a prompt or trained embeddings leave nothing
        below to cache, and train as with `"computed"`. See `frozen_prefix.FrozenPrefix` for what cannot be cached.
    """

    head: str = "trained"
    learning_rate: float = 1e-3
    epochs: int = 10
    head_learning_rate: float = 1e-3
    head_epochs: int = 20
    stage_one: str = "cached"
    batch_size: int = 32
    eval_batch_size: int = 128
    max_length: int = 128
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    patience: int | None = None
    select: str = "best"
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    precision: str = "fp32"
    stride: int | None = None
    pretraining: tuple[ContinuedPretraining, ...] = ()
    frozen_prefix: str = "computed"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("head", HEAD_POLICIES),
            ("stage_one", STAGE_ONE),
            ("frozen_prefix", FROZEN_PREFIX),
            ("schedule", SCHEDULES),
            ("select", SELECTIONS),
            ("precision", PRECISIONS),
        ):
            check_choice(field, getattr(self, field), allowed)
        for field in ("epochs", "head_epochs", "batch_size", "eval_batch_size"):
            check_whole(field, getattr(self, field), least=1)
        for field in ("train_rows", "test_rows", "patience"):
            check_whole(field, getattr(self, field), least=1, optional=True)
        check_whole("max_length", self.max_length, least=3)
        check_whole("validation_rows", self.validation_rows, least=0, optional=True)
        check_whole("stride", self.stride, least=0, below=self.max_length, optional=True)
        for field in ("learning_rate", "head_learning_rate", "epsilon"):
            check_number(field, getattr(self, field), above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_number("warmup", self.warmup, least=0, below=1)
        check_number("clip", self.clip, above=0, optional=True)
        betas = tuple(self.betas) if isinstance(self.betas, Iterable) else ()
        if len(betas) != 2:
            raise ArgumentError(f"betas={self.betas!r} is not allowed; give two numbers, e.g. (0.9, 0.999)")
        for beta in betas:
            check_number("betas", beta, least=0, below=1)
        # 1 and 1.0 are one protocol, and one JSON text.
        for field in ("learning_rate", "head_learning_rate", "epsilon", "weight_decay", "warmup", "clip"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, float(getattr(self, field)))
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        object.__setattr__(self, "pretraining", read_steps(self.pretraining))
        if self.validation_rows == 0 and (self.select == "best" or self.patience is not None):
            raise ArgumentError(
                f"validation_rows=0 is not allowed with select={self.select!r} and patience={self.patience!r}: "
                "without validation rows only select='last' and patience=None are possible"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; those of `LATER` only where they differ from their default."""
        record = {**dataclasses.asdict(self), "betas": list(self.betas)}
        for field, default in LATER.items():
            if getattr(self, field) == default:
                del record[field]
        if self.pretraining:
            record["pretraining"] = [step.to_dict() for step in self.pretraining]
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Protocol:
        """The inverse of `to_dict`; fields left out take their defaults."""
        return cls(**record)
