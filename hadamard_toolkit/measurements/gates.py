"""The values that gates take: recorded while batches pass, and measured on a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.gates import Gate
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import live
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks.registry import load_task

EXAMPLES = 64


class GateRecord:
    """The values that gates took, in the order in which examples passed."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], list[Tensor]] = {}

    def note(self, layer: int, gate: str, value: Tensor) -> None:
        """Append `value` [batch, 1, 1], which the gate at site `gate` of `layer` gave for one batch."""
        self._values.setdefault((layer, gate), []).append(value.detach().float().flatten().cpu())

    def table(self) -> pd.DataFrame:
        """One row per layer, gate and example: columns `layer`, `gate` (its site), `example`, `value` in (0, 1)."""
        columns = ["layer", "gate", "example", "value"]
        rows = [
            (layer, gate, example, value)
            for (layer, gate), values in self._values.items()
            for example, value in enumerate(torch.cat(values).tolist())
        ]
        return pd.DataFrame(rows, columns=columns)


@contextmanager
def record_gates(attachment: Attachment) -> Iterator[GateRecord]:
    """Record every gate of `attachment` in the block: run batches in it, then call `table()` of the record.

    Raises `UnsupportedError` where the adapter has no gates.
    """
    record = GateRecord()
    handles = []
    for name, module in attachment.model.named_modules():
        if isinstance(module, Gate):
            # hadamard_attachment.layers.3.query.gate
            _, _, layer, *rest = name.split(".")
            site = ".".join(rest).removesuffix(".gate")

            def note(
                module: nn.Module, args: Any, value: Tensor, layer: int = int(layer), site: str = site
            ) -> None:
                record.note(layer, site, value)

            handles.append(module.register_forward_hook(note))
    if not handles:
        raise UnsupportedError(f"{attachment.adapter} has no gates to record")
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def gates(run: Run, store: RunStore) -> pd.DataFrame:
    """Every gate of `run`, by layer, over the first 64 test rows: columns layer, gate, mean, sd (over examples), n.

    A gate is a number between 0 and 1 per example (Mao et al. 2022, section 3). The rows pass as one batch, and gates
    of the "original" kind see its padding. `store` is not needed. `ArgumentError` for a run without gates.
    """
    if not run.counts.loc["gate", "stored"]:
        raise ArgumentError(f"run {run.key} ({type(run.spec.adapter).__name__}) has no gates")
    model, tokenizer, attachment = live(run)
    task = load_task(run.spec.task)
    rows = task.splits["test"].select(range(min(EXAMPLES, task.splits["test"].num_rows)))
    texts = [list(rows[column]) for column in task.text_columns]
    batch = tokenizer(
        *texts,
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=run.spec.protocol.max_length,
        return_tensors="pt",
    )
    with torch.no_grad(), record_gates(attachment) as record:
        model.eval()(**batch.to(model.device))
    values = record.table().groupby(["layer", "gate"], sort=False)["value"]
    return values.agg(mean="mean", sd="std", n="count").reset_index()
