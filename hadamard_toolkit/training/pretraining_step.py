"""Continued pretraining as a step of a protocol: what it is (`continued` does it)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from hadamard_toolkit.errors import ArgumentError, check_choice, check_range

TASK = "task"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class ContinuedPretraining:
    """Masked-language-model training of the whole backbone before a method is attached (Gururangan et al. 2020).

    On the text of a domain this is their DAPT, on the task's own training text their TAPT; both in a row are both.

    Parameters
    ----------
    text: `"task"`, the training text of the task at hand; a domain of `continued.CORPORA` (`"biomed"`, `"cs"`,
        `"news"`, `"reviews"`, `"embedded/tweets"`, …); or the name of any task, for its training text. Labels, dev
        and test rows are never read.
    rows: at most so many different texts, drawn with `seed`; None takes all.
    epochs, learning_rate, batch_size, weight_decay, warmup: AdamW with a linear schedule, as in the loop. A step sees
        `batch_size` pieces of text.
    mask_share: share of the tokens that are chosen for prediction, anew each time a text is seen; of these 80 % become
        [MASK], 10 % another token, 10 % stay (Devlin et al. 2019).
    max_length: tokens per piece; a longer text is cut into consecutive pieces, so nothing of it is lost.
    precision: `"fp32"` or `"bf16"` (autocast).
    seed: of rows, order, masks, dropout and of a head that the checkpoint lacks. It is not the seed of the run, so that
        all runs with this step share one adapted backbone.
    """

    text: str = TASK
    rows: int | None = None
    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    mask_share: float = 0.15
    max_length: int = 128
    weight_decay: float = 0.01
    warmup: float = 0.06
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise ArgumentError(
                f"text={self.text!r} is not allowed; give 'task', a domain or the name of a task"
            )
        check_choice("precision", self.precision, PRECISIONS)
        least = {"epochs": 1, "batch_size": 1, "max_length": 8, "seed": 0, "rows": 2}
        for name, bound in least.items():
            value = getattr(self, name)
            if name == "rows" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentError(f"{name}={value!r} is not allowed; it must be a whole number >= {bound}")
            check_range(name, value, least=bound)
        for name in ("learning_rate", "mask_share", "weight_decay", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ArgumentError(f"{name}={value!r} is not allowed; it must be a number")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one step, and one JSON text
        check_range("learning_rate", self.learning_rate, above=0, below=float("inf"))
        check_range("mask_share", self.mask_share, above=0, below=1)
        check_range("weight_decay", self.weight_decay, least=0, below=float("inf"))
        check_range("warmup", self.warmup, least=0, below=1)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def read_steps(value: object) -> tuple[ContinuedPretraining, ...]:
    """Steps from what a protocol is given: a step, some of them, or what `to_dict` made of them."""
    if isinstance(value, ContinuedPretraining):
        return (value,)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ArgumentError(
            f"pretraining={value!r} is not allowed; give ContinuedPretraining(…) steps, e.g. (tapt(),)"
        )
    return tuple(_read_step(step) for step in value)


def _read_step(step: object) -> ContinuedPretraining:
    if isinstance(step, ContinuedPretraining):
        return step
    if not isinstance(step, dict):
        raise ArgumentError(f"pretraining has the step {step!r}; give ContinuedPretraining(…)")
    known = [entry.name for entry in fields(ContinuedPretraining)]
    for name in step:
        check_choice("field of ContinuedPretraining", name, known)
    return ContinuedPretraining(**step)
