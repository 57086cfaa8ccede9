"""SQuAD 1.1 (Rajpurkar et al. 2016): the answer to a question is a stretch of the paragraph beside it.

The official dev rows are the `test` split (the official test set is not public), so validation rows have to be held out
of `train`. Headline metric is F1, beside exact match, by the official rules (`training.squad_metrics`).
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.tasks.places import find, provenance, read_hub, read_local

HUB = "rajpurkar/squad"
FOLDER = "squad"
CITATION = "Rajpurkar et al. 2016, SQuAD 1.1; CC BY-SA 4.0"
COLUMNS = ("question", "context")
METRICS = ("f1", "exact-match")
OFFICIAL = {"train": 87599, "test": 10570}
_KEPT = ("id", "title", *COLUMNS, "answers", "start_unambiguous")
_LOCAL = {"train": "train", "test": "dev"}
_HUB = {"train": "train", "test": "validation"}


def load(root: str | Path | None = None, *, unambiguous: bool = False) -> Task:
    """SQuAD 1.1 as a task of kind `span`: columns `id, title, question, context, answers{text, answer_start}`.

    Asked in order: `root` (alone, if given), `$HADAMARD_DATA` or else `../shared/data` beside the checkout, the hub's
    `rajpurkar/squad`. Local files lie as `squad/{train,dev}.parquet`. Where the starts of the training answers were
    computed and not annotated, a column `start_unambiguous` says whether the answer occurs once only; `unambiguous`
    (the task `squad-unambiguous`) keeps these training rows alone. The test rows are the same either way.

    Raises `DataError` if no place has the data, or if an answer is not where it is said to start.
    """
    origin, found = find(
        "squad",
        root,
        FOLDER,
        HUB,
        lambda place: read_local(place, FOLDER, _LOCAL),
        lambda: read_hub(HUB, "plain_text", _HUB),
    )
    splits = found.splits(COLUMNS, "span", 0, _KEPT)
    record = provenance(origin, OFFICIAL, splits, found.files, CITATION)
    if unambiguous:
        splits["train"], dropped = _only_unambiguous(splits["train"])
        record["rows"] = {**record["rows"], "train": splits["train"].num_rows}
        record["subset"] = True
        remark = f"{dropped:,} training rows left out whose answer occurs more than once"
        record["note"] = "; ".join(filter(None, (record["note"], remark)))
    return Task(
        name="squad-unambiguous" if unambiguous else "squad",
        splits=splits,
        text_columns=COLUMNS,
        kind="span",
        labels=(),
        metric=METRICS[0],
        metrics=METRICS,
        provenance=record,
    )


def _only_unambiguous(rows: Dataset) -> tuple[Dataset, int]:
    """The rows whose answer occurs once in its context, and how many others there are; annotated starts all count."""
    if "start_unambiguous" not in rows.column_names:
        return rows, 0
    kept = [row for row, alone in enumerate(rows["start_unambiguous"]) if alone]
    return rows.select(kept), rows.num_rows - len(kept)
