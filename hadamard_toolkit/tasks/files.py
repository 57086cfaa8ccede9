"""A task as files that need no other place: its rows as parquet, and all else that a `Task` says as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
from datasets import DatasetDict

from hadamard_toolkit.tasks.base import Task, in_memory

ABOUT = "task.json"


def write_task(task: Task, folder: Path) -> None:
    """Write `task` into `folder`, which is made."""
    folder.mkdir(parents=True)
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    fields["splits"] = list(task.splits)
    (folder / ABOUT).write_text(json.dumps(fields, indent=1) + "\n", "utf-8")
    for split, rows in task.splits.items():
        pq.write_table(rows.with_format("arrow")[:], folder / f"{split}.parquet")


def read_task(folder: Path) -> Task:
    """The task that `write_task` wrote: the same rows, and the provenance of where they came from."""
    fields = json.loads((folder / ABOUT).read_text("utf-8"))
    splits = {split: in_memory(pq.read_table(folder / f"{split}.parquet")) for split in fields["splits"]}
    return Task(**{**fields, "splits": DatasetDict(splits)})
