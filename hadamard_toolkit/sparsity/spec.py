"""`Sparsity`: all choices of pruning an adapter, as one value of a run's spec. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hadamard_toolkit.errors import ArgumentError, check_choice, check_fields, check_number, check_whole

SCORERS = ("random", "magnitude", "erdos-renyi", "snip", "grasp", "synflow")
SCOPES = ("global", "tensor", "layer")
KINDS = ("projections", "biases", "vectors", "prefixes", "norms", "gates", "backbone")
WHEN = ("init", "gradual")
# What `controls` makes, beside the dense adapter.
CONTROLS = ("shuffled", "margins", "random", "uniform", "reinitialised")
Maskable = str | tuple[str, ...]


@check_fields
@dataclass(frozen=True)
class Sparsity:
    """How an adapter is pruned in a run; see `sparsify` and, for `when="gradual"`, `GradualPruning`.

    Parameters
    ----------
    scorer, sparsity, scope, rounds, maskable: as in `sparsify`; `sparsity` is the share removed.
    examples, batch_size: rows of the run's training part that scores are computed on, and how many at a time.
    seed: of what is random in the mask. data_seed: draws those rows. None takes the run's seed; fix one and vary the
        other to tell the shared initialisation from the shared data in an overlap of masks.
    warmup_steps: training steps on the same batches before scoring.
    when: `"init"`, or `"gradual"`: by magnitude during training, from `begin` to `end` (shares of the steps of the
        stage that trains the adapter), every `every` steps.
    control: None, or train a control of this mask in its place: `"shuffled"`, `"margins"`, `"random"`,
        `"uniform"` or `"reinitialised"`; see `controls`.
    """

    scorer: str
    sparsity: float
    scope: str = "global"
    rounds: int = 1
    maskable: Maskable = "projections"
    examples: int = 320
    batch_size: int = 32
    seed: int | None = None
    data_seed: int | None = None
    warmup_steps: int = 0
    when: str = "init"
    begin: float = 0.1
    end: float = 0.7
    every: int = 10
    control: str | None = None

    def __post_init__(self) -> None:
        check_choice("scorer", self.scorer, SCORERS)
        check_sparsity(self.sparsity)
        object.__setattr__(self, "sparsity", float(self.sparsity))
        check_choice("scope", self.scope, SCOPES)
        for name in ("rounds", "examples", "batch_size", "every"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("warmup_steps", self.warmup_steps, least=0)
        for name in ("seed", "data_seed"):
            check_whole(name, getattr(self, name), least=0, optional=True)
        if not isinstance(self.maskable, str):
            object.__setattr__(self, "maskable", tuple(self.maskable))
        check_choice("when", self.when, WHEN)
        check_schedule(self.begin, self.end, self.every)
        check_choice("control", self.control, (None, *CONTROLS))
        if self.when == "gradual":
            self._check_gradual()

    def _check_gradual(self) -> None:
        if self.scorer != "magnitude":
            raise ArgumentError(
                f"scorer={self.scorer!r} is not allowed with when='gradual'; choose 'magnitude'"
            )
        for name, default in (("rounds", 1), ("warmup_steps", 0), ("control", None)):
            if getattr(self, name) != default:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} is not allowed with when='gradual'; leave it out"
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        record = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sparsity:
        """The inverse of `to_dict`; fields left out take their defaults."""
        return cls(**record)


def check_sparsity(value: object) -> None:
    """Raise `ArgumentError` unless `value` is a share to remove: 0 <= value < 1."""
    check_number("sparsity", value, least=0, below=1)


def check_schedule(begin: float, end: float, every: int) -> None:
    """Raise `ArgumentError` unless 0 <= begin < end <= 1 and every >= 1."""
    check_number("begin", begin, least=0, below=1)
    check_number("end", end, above=begin, most=1)
    check_whole("every", every, least=1)
