"""A step of continued pretraining as a value of a protocol; `continued_pretraining` carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hadamard_toolkit.errors import ArgumentError, check_choice, check_fields, check_number, check_whole

TASK = "task"
PRECISIONS = ("fp32", "bf16")


@check_fields
@dataclass(frozen=True)
class ContinuedPretraining:
    """Masked-language-model training of the whole backbone before a method is attached (Gururangan et al. 2020).

    On the text of a domain this is their DAPT, on the task's own training text their TAPT; both in a row are both.

    Parameters
    ----------
    text: `"task"`, the training text of the task at hand; a domain of `continued_pretraining.CORPORA`
        (`"biomed"`, `"cs"`, `"news"`, `"reviews"`, `"embedded/tweets"`, …); or the name of any task, for its training
        text. Labels, dev and test rows are never read.
    rows: at most that many different texts, drawn with `seed`; None takes all.
    epochs, learning_rate, batch_size, weight_decay, warmup: AdamW with a linear schedule, as in the loop. A step sees
        `batch_size` pieces of text.
    mask_share: share of the tokens that are chosen for prediction, anew each time a text is seen; of these 80 % become
        [MASK], 10 % another token, 10 % stay (Devlin et al. 2019).
    max_length: tokens per piece; a longer text is cut into consecutive pieces.
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
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 8), ("seed", 0)):
            check_whole(name, getattr(self, name), least=least)
        check_whole("rows", self.rows, least=2, optional=True)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("mask_share", self.mask_share, above=0, below=1)
        check_number("weight_decay", self.weight_decay, least=0)
        check_number("warmup", self.warmup, least=0, below=1)
        for name in ("learning_rate", "mask_share", "weight_decay", "warmup"):
            object.__setattr__(
                self, name, float(getattr(self, name))
            )  # 1 and 1.0 are one step, and one JSON text

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def read_steps(value: object) -> tuple[ContinuedPretraining, ...]:
    """The steps that a protocol was given: a step, several, or what `to_dict` made of them."""
    if isinstance(value, ContinuedPretraining):
        return (value,)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ArgumentError(
            f"pretraining={value!r} is not allowed; give ContinuedPretraining(…) steps, e.g. (tapt(),)"
        )
    steps = tuple(ContinuedPretraining(**step) if isinstance(step, dict) else step for step in value)
    for step in steps:
        if not isinstance(step, ContinuedPretraining):
            raise ArgumentError(f"pretraining has the step {step!r}; give ContinuedPretraining(…)")
    return steps
