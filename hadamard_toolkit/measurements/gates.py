"""What the gates of a trained mixture do."""

from __future__ import annotations

import pandas as pd
import torch

from hadamard_toolkit.adapters.gates import record_gates
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.live import live
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks.registry import load_task

EXAMPLES = 64


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
