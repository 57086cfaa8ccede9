"""The embedded suite: eleven tasks from four human-rated domains, without hub (data card: `data/README.md`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, DatasetDict

from hadamard_toolkit.errors import check_choice
from hadamard_toolkit.tasks import probing
from hadamard_toolkit.tasks.base import Task, in_memory
from hadamard_toolkit.tasks.vader import DISTRIBUTION, FILES, SEED, Sentence, corpus

DOMAINS = tuple(FILES)
MARGIN = 0.5
SPLITS = ("train", "validation", "test")
LICENCE = "MIT (package vaderSentiment); cite Hutto and Gilbert 2014"

# `root` is part of every loader's signature; the suite needs no data root.


def polarity(domain: str, root: str | Path | None = None) -> Task:
    """Is a text of `domain` positive (1) or negative (0); texts with |mean rating| < 0.5 are left out."""
    check_choice("domain", domain, DOMAINS)
    rows = [s for s in corpus() if s.domain == domain and abs(s.rating) >= MARGIN]
    return _task(f"{domain}-polarity", _rated(rows, lambda s: int(s.rating > 0)), ("negative", "positive"))


def intensity(domain: str, root: str | Path | None = None) -> Task:
    """The mean rating of a text of `domain`, between -4 and 4."""
    check_choice("domain", domain, DOMAINS)
    return _task(
        f"{domain}-intensity", _rated([s for s in corpus() if s.domain == domain], lambda s: s.rating)
    )


def domain_identification(root: str | Path | None = None) -> Task:
    """Which of the four domains a text is from; balanced."""
    return _task("domain-identification", _probed(probing.domain_rows), DOMAINS)


def word_order(root: str | Path | None = None) -> Task:
    """Is a sentence intact, or were two neighbouring words swapped; balanced (bigram shift of Conneau et al. 2018)."""
    return _task("word-order", _probed(probing.order_rows), ("swapped", "intact"))


def next_sentence(root: str | Path | None = None) -> Task:
    """Does sentence 2 follow sentence 1 in the same document; balanced, editorials and product reviews."""
    columns = ("sentence1", "sentence2")
    return _task("next-sentence", _probed(probing.following_rows), ("unrelated", "follows"), columns)


def _rated(sentences: Iterable[Sentence], label: Callable[[Sentence], int | float]) -> DatasetDict:
    chosen = list(sentences)
    return DatasetDict(
        {
            split: in_memory(
                {
                    "text": [s.text for s in chosen if s.split == split],
                    "label": [label(s) for s in chosen if s.split == split],
                    "rating": [s.rating for s in chosen if s.split == split],
                    "document": [f"{s.domain}/{s.document}" for s in chosen if s.split == split],
                }
            )
            for split in SPLITS
        }
    )


def _probed(make: Callable[[Iterable[Sentence]], list[probing.Row]]) -> DatasetDict:
    return DatasetDict(_probed_splits(make, corpus()))


@lru_cache(maxsize=3)
def _probed_splits(
    make: Callable[[Iterable[Sentence]], list[probing.Row]], sentences: tuple[Sentence, ...]
) -> dict[str, Dataset]:
    splits = {}
    for split in SPLITS:
        rows = make(s for s in sentences if s.split == split)
        splits[split] = in_memory({column: [row[column] for row in rows] for column in rows[0]})
    return splits


def _task(
    name: str, splits: DatasetDict, labels: tuple[str, ...] = (), columns: tuple[str, ...] = ("text",)
) -> Task:
    """A classification of these labels, or a regression where there are none."""
    by_labels = {0: ("spearman", "pearson"), 2: ("accuracy", "f1")}
    metrics = by_labels.get(len(labels), ("accuracy",))
    rows = {split: data.num_rows for split, data in splits.items()}
    remark = "; 732 of the 872 SST-2 test sentences are among this domain's texts"
    provenance = {
        "source": f"package {DISTRIBUTION.project} {DISTRIBUTION.version}, source distribution",
        "files": {DISTRIBUTION.filename: DISTRIBUTION.sha256},
        "official_rows": rows,
        "rows": rows,
        "subset": False,
        "note": f"split by document with seed {SEED}{remark if name.startswith('movies') else ''}; "
        "data card: data/README.md",
        "licence": LICENCE,
    }
    kind = "classification" if labels else "regression"
    return Task(f"embedded/{name}", splits, columns, kind, labels, metrics[0], provenance, metrics)
