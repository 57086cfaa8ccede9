"""The eight classification tasks of four domains (Gururangan et al. 2020), from local parquet files or from the hub.

BioMed: ChemProt and RCT; computer science: ACL-ARC and SciERC; news: HyperPartisan and AGNews; reviews: Helpfulness and
IMDB. They keep their own validation split. Headline metrics are the paper's: micro-averaged F1 for ChemProt and RCT
(over all classes, so it equals accuracy), macro-averaged F1 for the others.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import DatasetDict

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.tasks.places import Found, checked_file, find, provenance, read_hub, read_local

TEXT = ("text",)
_LOCAL = {"train": "train", "validation": "dev", "test": "test"}
_HUB = {"train": "train", "validation": "validation", "test": "test"}
_MACRO = ("macro-f1", "accuracy")
_MICRO = ("micro-f1", "macro-f1")


@dataclass(frozen=True)
class _Source:
    """`folder` in the local layout, `hub` id, label names in order, metrics (headline first), the paper's rows.

    `note` is said whenever the data come from a local folder, `hub_note` when they come from the hub.
    """

    domain: str
    folder: str
    hub: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[int, int, int]
    citation: str
    note: str = ""
    hub_note: str = ""

    @property
    def official(self) -> dict[str, int]:
        return dict(zip(_LOCAL, self.rows, strict=True))


SOURCES: dict[str, _Source] = {
    "chemprot": _Source(
        "biomed",
        "ChemProt",
        "zapsdcn/chemprot",
        (
            *(
                "ACTIVATOR",
                "AGONIST",
                "AGONIST-ACTIVATOR",
                "AGONIST-INHIBITOR",
                "ANTAGONIST",
                "DOWNREGULATOR",
            ),
            *("INDIRECT-DOWNREGULATOR", "INDIRECT-UPREGULATOR", "INHIBITOR", "PRODUCT-OF", "SUBSTRATE"),
            *("SUBSTRATE_PRODUCT-OF", "UPREGULATOR"),
        ),
        _MICRO,
        (4169, 2427, 3469),
        "Kringelum et al. 2016, BioCreative VI; research use, no licence stated",
    ),
    "rct": _Source(
        "biomed",
        "RCT-20k",
        "zapsdcn/rct-20k",
        ("BACKGROUND", "CONCLUSIONS", "METHODS", "OBJECTIVE", "RESULTS"),
        _MICRO,
        (180040, 30212, 30135),
        "Dernoncourt and Lee 2017, PubMed 200k RCT; research use, no licence stated",
    ),
    "acl-arc": _Source(
        "cs",
        "ACL-ARC",
        "zapsdcn/citation_intent",
        ("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses"),
        _MACRO,
        (1688, 114, 139),
        "Jurgens et al. 2018; research use, no licence stated",
    ),
    "scierc": _Source(
        "cs",
        "SciERC",
        "zapsdcn/sciie",
        ("COMPARE", "CONJUNCTION", "EVALUATE-FOR", "FEATURE-OF", "HYPONYM-OF", "PART-OF", "USED-FOR"),
        _MACRO,
        (3219, 455, 974),
        "Luan et al. 2018; research use, no licence stated",
    ),
    "hyperpartisan": _Source(
        "news",
        "HyperPartisan",
        "zapsdcn/hyperpartisan_news",
        ("false", "true"),
        _MACRO,
        (515, 65, 65),
        "Kiesel et al. 2019, SemEval task 4; CC BY 4.0",
        note="own random stratified split (seed 0) of the paper's sizes, not the paper's split",
    ),
    "agnews": _Source(
        "news",
        "AGNews",
        "fancyzhx/ag_news",
        ("World", "Sports", "Business", "Sci/Tech"),
        _MACRO,
        (115000, 5000, 7600),
        "Zhang et al. 2015, from A. Gulli's corpus; non-commercial use",
        hub_note="the hub has no validation split: its 120,000 training rows hold the paper's 5,000 validation rows",
    ),
    "helpfulness": _Source(
        "reviews",
        "Helpfulness",
        "vannacute/AmazonReviewHelpfulness",
        ("helpful", "unhelpful"),
        _MACRO,
        (115251, 5000, 25000),
        "McAuley et al. 2015, Amazon reviews; research use, no licence stated",
    ),
    "imdb": _Source(
        "reviews",
        "IMDB",
        "zapsdcn/imdb",
        ("neg", "pos"),
        _MACRO,
        (20000, 5000, 25000),
        "Maas et al. 2011; research use, no licence stated",
    ),
}


def load(name: str, root: str | Path | None = None) -> Task:
    """A domain task by its key in `SOURCES`.

    Asked in order: `root` (alone, if given), `$HADAMARD_DATA` or else `../shared/data` beside the checkout, the hub.
    Local files lie as `domains/<TASK>/{train,dev,test}.parquet` with `labels.json`; RCT and Helpfulness are usually
    on the hub only.

    The provenance compares every split with the paper's number of rows, names its `domain`, and counts in
    `duplicates` the different texts that two splits share ("train/test": 93), which are left as in the sources.
    Raises `DataError` if no place has the task, or if columns or labels are not the task's.
    """
    source = SOURCES[name]
    folder = f"domains/{source.folder}"
    origin, found = find(
        name,
        root,
        folder,
        source.hub,
        lambda place: _read_local(place, folder, source),
        lambda: read_hub(source.hub, None, _HUB, label_names=True),
    )
    for split, table in found.tables.items():
        found.tables[split] = _numbered(table, source.labels, found.where[split])
    splits = found.splits(TEXT, "classification", len(source.labels), (*TEXT, "label", "id"))
    official = source.official
    if "validation" not in splits:
        official["train"] += official.pop("validation")
    record = provenance(origin, official, splits, found.files, source.citation)
    remark = source.hub_note if origin.startswith("hub") else source.note
    return Task(
        name=name,
        splits=splits,
        text_columns=TEXT,
        kind="classification",
        labels=source.labels,
        metric=source.metrics[0],
        metrics=source.metrics,
        provenance={
            **record,
            "note": "; ".join(filter(None, (record["note"], remark))),
            "domain": source.domain,
            "duplicates": shared_texts(splits),
        },
    )


def _read_local(root: Path, folder: str, source: _Source) -> Found:
    found = read_local(root, folder, _LOCAL)
    file = f"{folder}/labels.json"
    path, found.files[file] = checked_file(root, file)
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if listed != list(source.labels):
        raise DataError(f"{path} lists the labels {listed!r}; the task has {list(source.labels)!r}")
    return found


def _numbered(table: pa.Table, labels: tuple[str, ...], where: str) -> pa.Table:
    """`table` with label names (in any case, `_` for `-`) replaced by their numbers; numbers stay."""
    if "label" not in table.column_names or pa.types.is_integer(table.schema.field("label").type):
        return table
    numbers = {_plain(label): number for number, label in enumerate(labels)}
    names = [str(label) for label in table["label"].to_pylist()]
    unknown = sorted({label for label in names if _plain(label) not in numbers})
    if unknown:
        raise DataError(
            f"{where}: column 'label' has {unknown[0]!r}; allowed are {', '.join(map(repr, labels))}"
        )
    column = pa.array([numbers[_plain(label)] for label in names], pa.int64())
    return table.set_column(table.column_names.index("label"), "label", column)


def _plain(label: str) -> str:
    return re.sub(r"[-_\s]", "", label.casefold())


def shared_texts(splits: DatasetDict) -> dict[str, int]:
    """How many different texts each two splits share, e.g. `{"train/test": 93}`; pairs that share none are left out."""
    texts = {split: set(rows["text"]) for split, rows in splits.items()}
    counts = {
        f"{one}/{other}": len(texts[one] & texts[other]) for one, other in itertools.combinations(texts, 2)
    }
    return {pair: count for pair, count in counts.items() if count}
