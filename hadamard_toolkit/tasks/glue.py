"""The eight GLUE tasks (Wang et al. 2018, without WNLI), from local parquet files or from the hub.

The official validation rows are the `test` split (the official test labels are not public), so a validation split has
to be held out of `train`. Headline metrics: MRPC and QQP by F1 as in UniPELT (Mao et al. 2022; other papers print
accuracy, which is reported beside it), CoLA by Matthews correlation, STS-B by Spearman, the rest by accuracy, MNLI on
matched and mismatched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetDict, load_dataset

from hadamard_toolkit.downloads import file_sha256
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks.base import Task, check_rows, in_memory
from hadamard_toolkit.tasks.files import local_roots, read_parquet

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
    source, tried = SOURCES[name], []
    for folder in local_roots(root):
        if (folder / "glue" / source.folder).is_dir():
            return _task(
                name, source, f"local parquet files, glue/{source.folder}", *_read_local(name, source, folder)
            )
        origin = "root" if root is not None else "$HADAMARD_DATA or ../shared/data"
        tried.append(f"{folder / 'glue' / source.folder} ({origin}) does not exist")
    if root is None:
        try:
            return _task(name, source, f"hub {HUB}", *_read_hub(name))
        except DataError:
            raise
        except (
            Exception
        ) as error:  # whatever the hub's client raises: no network, offline mode, no such repository
            reason = str(error).strip().partition("\n")[0]
            tried.append(f"hub {HUB!r} cannot be read ({type(error).__name__}: {reason})")
    raise DataError(
        f"task {name!r} is nowhere to be found: {'; '.join(tried)}. Set HADAMARD_DATA to a folder with "
        f"glue/{source.folder}/*.parquet, or allow the hub; the tasks 'embedded/…' need neither"
    )


def _read_local(
    name: str, source: _Source, root: Path
) -> tuple[dict[str, pa.Table], dict[str, str], dict[str, str]]:
    """Tables, where each split came from, and each file's SHA-256."""
    tables, places, digests = {}, {}, {}
    for split, stem in (_LOCAL_MNLI if name == "mnli" else _LOCAL).items():
        file = f"glue/{source.folder}/{stem}.parquet"
        tables[split], digests[file] = read_parquet(root, file)
        places[split] = str(root / file)
    return tables, places, digests


def _read_hub(name: str) -> tuple[dict[str, pa.Table], dict[str, str], dict[str, str]]:
    """As `_read_local`; the files are those of the hub's local cache, named by the revision."""
    names = _HUB_MNLI if name == "mnli" else _HUB
    loaded = load_dataset(HUB, name)
    tables = {split: loaded[official].with_format("arrow")[:] for split, official in names.items()}
    places = {split: f"hub {HUB}, {name}, split {official}" for split, official in names.items()}
    cached = [Path(file["filename"]) for official in names.values() for file in loaded[official].cache_files]
    return (
        tables,
        places,
        {f"{HUB}@{file.parent.name}/{name}/{file.name}": file_sha256(file) for file in cached},
    )


def _task(
    name: str,
    source: _Source,
    origin: str,
    tables: dict[str, pa.Table],
    places: dict[str, str],
    files: dict[str, str],
) -> Task:
    splits = DatasetDict()
    for split, table in tables.items():
        rows = in_memory(table)
        check_rows(rows, source.text_columns, source.kind, len(source.labels), places[split])
        splits[split] = rows.select_columns(
            [c for c in (*source.text_columns, "label", "idx") if c in rows.column_names]
        )
    return Task(
        name=name,
        splits=splits,
        text_columns=source.text_columns,
        kind=source.kind,
        labels=source.labels,
        metric=source.metrics[0],
        metrics=source.metrics,
        provenance=_provenance(
            source, origin, {split: rows.num_rows for split, rows in splits.items()}, files
        ),
    )


def _provenance(source: _Source, origin: str, rows: dict[str, int], files: dict[str, str]) -> dict[str, Any]:
    short = [
        f"{split} {rows[split]:,} of {official:,} rows ({rows[split] / official:.1%})"
        for split, official in source.rows.items()
        if rows[split] < official
    ]
    return {
        "source": origin,
        "files": files,
        "official_rows": dict(source.rows),
        "rows": rows,
        "subset": bool(short),
        "note": f"subset: {'; '.join(short)}" if short else "",
        "licence": CITATION,
    }
