"""Pruning as a step of a run: batches drawn from a task, masks applied before or during training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment, attach
from hadamard_toolkit.errors import ArgumentError, check_whole
from hadamard_toolkit.sparsity.batches import Batches
from hadamard_toolkit.sparsity.controls import control
from hadamard_toolkit.sparsity.prune import sparsify
from hadamard_toolkit.sparsity.schedule import GradualPruning
from hadamard_toolkit.sparsity.scores import SCORERS
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.training.data import kind_of
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.splits import draw

_STREAM = 2  # `splits.draw` has 0 and 1 of the same seed


def draw_batches(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: int = 320,
    batch_size: int = 32,
    seed: int = 0,
    max_length: int = 128,
    stride: int | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Batches:
    """`examples` training rows of `task`, drawn with `seed`, in batches of similar length, for `sparsify`.

    Of a span task they are questions, and the batches hold every window over their contexts (`max_length` and `stride`
    as in `Protocol`), as training does: the loss is the mean of start and end cross-entropy, and a window without
    the answer points at [CLS]. `rows` limits the draw to these positions of the training split (a run draws from
    what it trains on, never from its validation rows). The batches know their seed, task and rows, and
    `Masks.provenance` keeps that. Raises `ArgumentError` for more examples than there are.
    """
    check_whole("examples", examples, least=1)
    check_whole("batch_size", batch_size, least=1)
    check_whole("seed", seed, least=0)
    check_whole("max_length", max_length, least=3)
    pool = np.arange(len(task.splits["train"])) if rows is None else np.sort(np.asarray(rows))
    if examples > len(pool):
        raise ArgumentError(
            f"examples={examples} is not allowed; there are {len(pool)} training rows to draw from"
        )
    drawn = np.sort(np.random.default_rng([seed, _STREAM]).permutation(pool)[:examples])
    kind = kind_of(task, tokenizer, Protocol(max_length=max_length, stride=stride))
    encoded = kind.encode(task.splits["train"].select(drawn))
    order = np.argsort(encoded.lengths, kind="stable").tolist()
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [kind.collate(encoded.__getitems__(group)) for group in groups]
    origin = {
        "data_seed": seed,
        "task": task.name,
        "rows_sha256": hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest(),
        "batch_size": batch_size,
        "max_length": max_length,
    }
    if task.kind == "span":
        origin |= {"questions": examples, "stride": stride}
    return replace(Batches.of(inputs_of(batch) | kind.targets(batch) for batch in batches), origin=origin)


def prune_for_run(
    attachment: Attachment,
    sparsity: Sparsity,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    seed: int,
) -> tuple[Attachment, GradualPruning | None]:
    """Apply the masks of `sparsity` before training. Returns the attachment, and what `train` calls after every step.

    The control with other initial weights needs a new attachment; otherwise it is the one that was given.
    """
    if sparsity.when == "gradual":
        names = ("sparsity", "scope", "begin", "end", "every", "maskable")
        return attachment, GradualPruning(attachment, **{name: getattr(sparsity, name) for name in names})
    mask_seed = seed if sparsity.seed is None else sparsity.seed
    batches = None
    if SCORERS[sparsity.scorer].data or sparsity.warmup_steps:
        batches = draw_batches(
            task,
            tokenizer,
            examples=sparsity.examples,
            batch_size=sparsity.batch_size,
            seed=seed if sparsity.data_seed is None else sparsity.data_seed,
            max_length=protocol.max_length,
            stride=protocol.stride,
            rows=draw(task.splits, protocol, seed)["train"].rows,
        )
    names = ("scorer", "sparsity", "scope", "rounds", "maskable", "warmup_steps")
    settings = {name: getattr(sparsity, name) for name in names}
    masks = sparsify(attachment, batches=batches, seed=mask_seed, **settings)
    if sparsity.control is not None:
        other = control(masks, sparsity.control, mask_seed)
        masks.remove()
        if other.init_seed != attachment.seed:
            attachment = attach(attachment.detach(), attachment.adapter, seed=other.init_seed)
        other.apply(attachment)
    return attachment, None
