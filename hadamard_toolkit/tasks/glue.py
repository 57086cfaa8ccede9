"""The eight GLUE tasks (Wang et al. 2018, without WNLI), from local parquet files or from the hub.

The official validation rows are the `test` split (the official test labels are not public), so a validation split has
to be held out of `train`. Headline metrics: MRPC and QQP by F1 as in UniPELT (Mao et al. 2022; other papers print
accuracy, which is reported beside it), CoLA by Matthews correlation, STS-B by Spearman, the rest by accuracy, MNLI on
matched and mismatched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.tasks.places import find, provenance, read_hub, read_local

HUB = "nyu-mll/glue"
CITATION = "Wang et al. 2018, GLUE; each task keeps its own terms"


@dataclass(frozen=True)
class _Source:
    """`folder` in the local layout, columns, label names, metrics (headline first), official rows of each split."""

    folder: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[str, int]

    @property
    def kind(self) -> str:
        return "classification" if self.labels else "regression"


_PAIR = ("sentence1", "sentence2")
_EQUIVALENT = ("not_equivalent", "equivalent")
_ENTAILED = ("entailment", "not_entailment")
_F1 = ("f1", "accuracy")
SOURCES: dict[str, _Source] = {
    "cola": _Source(
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
        {"train": 8551, "test": 1043},
    ),
    "sst2": _Source(
        "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",), {"train": 67349, "test": 872}
    ),
    "mrpc": _Source("MRPC", _PAIR, _EQUIVALENT, _F1, {"train": 3668, "test": 408}),
    "qqp": _Source(
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        _F1,
        {"train": 363846, "test": 40430},
    ),
    "stsb": _Source("STS-B", _PAIR, (), ("spearman", "pearson"), {"train": 5749, "test": 1500}),
    "mnli": _Source(
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"train": 392702, "test": 9815, "test_mismatched": 9832},
    ),
    "qnli": _Source(
        "QNLI", ("question", "sentence"), _ENTAILED, ("accuracy",), {"train": 104743, "test": 5463}
    ),
    "rte": _Source("RTE", _PAIR, _ENTAILED, ("accuracy",), {"train": 2490, "test": 277}),
}
_LOCAL = {"train": "train", "test": "dev"}
_LOCAL_MNLI = {"train": "train", "test": "dev_matched", "test_mismatched": "dev_mismatched"}
_HUB = {"train": "train", "test": "validation"}
_HUB_MNLI = {"train": "train", "test": "validation_matched", "test_mismatched": "validation_mismatched"}


def load(name: str, root: str | Path | None = None) -> Task:
    """A GLUE task by its key in `SOURCES`.

    Asked in order: `root` (alone, if given), `$HADAMARD_DATA` or else `../shared/data` beside the checkout, the hub's
    `nyu-mll/glue`. Local files lie as `glue/<TASK>/{train,dev}.parquet` (MNLI: `dev_matched`, `dev_mismatched`).

    The provenance compares every split with its official number of rows and says `subset` where one falls short. Raises
    `DataError` if no place has the task, or if columns or labels are not the task's.
    """
    source = SOURCES[name]
    folder = f"glue/{source.folder}"
    local, hub = (_LOCAL_MNLI, _HUB_MNLI) if name == "mnli" else (_LOCAL, _HUB)
    origin, found = find(
        name,
        root,
        folder,
        HUB,
        lambda place: read_local(place, folder, local),
        lambda: read_hub(HUB, name, hub),
    )
    columns = (*source.text_columns, "label", "idx")
    splits = found.splits(source.text_columns, source.kind, len(source.labels), columns)
    return Task(
        name=name,
        splits=splits,
        text_columns=source.text_columns,
        kind=source.kind,
        labels=source.labels,
        metric=source.metrics[0],
        metrics=source.metrics,
        provenance=provenance(origin, source.rows, splits, found.files, CITATION),
    )
