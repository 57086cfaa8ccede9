"""The human-rated sentences of Hutto and Gilbert (2014) in four domains, and their one split by document.

They lie in the source distribution of the package vaderSentiment (MIT): tweets, snippets of film reviews, sentences of
product reviews, sentences of newspaper editorials, each with the mean of about twenty ratings between -4 and 4.
"""

from __future__ import annotations

import hashlib
import html
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hadamard_toolkit.downloads import Distribution, fetch

DISTRIBUTION = Distribution(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    2_466_783,
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
SEED = 2014
SHARES = {"test": 0.2, "validation": 0.1}  # of the sentences of a domain; the rest is "train"


@dataclass(frozen=True)
class Sentence:
    """A rated sentence: its `number` within its `document`, its mean `rating` in [-4, 4], its `split`."""

    domain: str
    document: str
    number: int
    text: str
    rating: float
    split: str = ""


def corpus() -> tuple[Sentence, ...]:
    """All sentences of the four domains with their split, in the order of the files.

    No document and no text (up to case, punctuation, user names and addresses) is in two splits.
    """
    return _corpus(fetch(DISTRIBUTION))


@lru_cache(maxsize=1)
def _corpus(distribution: Path) -> tuple[Sentence, ...]:
    return tuple(split_by_document(list(_read(distribution))))


def _read(distribution: Path) -> Iterator[Sentence]:
    release = f"{DISTRIBUTION.project}-{DISTRIBUTION.version}"
    with tarfile.open(distribution) as outer:
        packed = outer.extractfile(f"{release}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=packed) as inner:
            for domain, file in FILES.items():
                member = inner.extractfile(f"hutto_ICWSM_2014/{file}")
                assert member is not None  # the archive's SHA-256 is pinned
                yield from parse(domain, member.read().decode())


def parse(domain: str, lines: str) -> Iterator[Sentence]:
    """Sentences of one file: tab-separated id (`document_number`, or the document alone), rating, text.

    HTML entities are resolved, runs of white space become one space, empty texts are left out.
    """
    for line in filter(None, lines.split("\r\n")):
        identity, rating, text = line.split("\t")
        document, _, number = identity.partition("_")
        # Some entities of the source are escaped twice.
        if cleaned := " ".join(html.unescape(html.unescape(text)).split()):
            yield Sentence(domain, document, int(number or 1), cleaned, float(rating))


def without_masks(text: str) -> str:
    """The text without the corpus's stand-ins for user names and addresses."""
    return " ".join(re.sub(r"@anonymous|http://url_removed", " ", text).split())


def normalised(text: str) -> str:
    """Lower-case words of a text, without punctuation and stand-ins; the text itself if nothing else is in it."""
    return " ".join(re.findall(r"\w+", re.sub(r"\brt\b", " ", without_masks(text).lower()))) or text


def rank(*parts: object) -> bytes:
    """A position in a random order that is the same on every machine and under every version of every library."""
    return hashlib.sha256(" ".join(map(str, (SEED, *parts))).encode()).digest()


def split_by_document(sentences: list[Sentence]) -> Iterator[Sentence]:
    """The sentences with their split: documents tied by a common text stay together, in an order drawn with `SEED`."""
    components = _components(sentences)
    sizes = {domain: sum(s.domain == domain for s in sentences) for domain in {s.domain for s in sentences}}
    members: dict[int, list[Sentence]] = {}
    for sentence, component in zip(sentences, components, strict=True):
        members.setdefault(component, []).append(sentence)
    filled: dict[tuple[str, str], int] = {}
    chosen: dict[int, str] = {}
    for component in sorted(members, key=lambda c: rank(members[c][0].domain, members[c][0].document)):
        domain = members[component][0].domain
        open_splits = (s for s, share in SHARES.items() if filled.get((domain, s), 0) < share * sizes[domain])
        split = next(open_splits, "train")
        chosen[component] = split
        for sentence in members[component]:
            filled[sentence.domain, split] = filled.get((sentence.domain, split), 0) + 1
    for sentence, component in zip(sentences, components, strict=True):
        yield replace(sentence, split=chosen[component])


def _components(sentences: list[Sentence]) -> list[int]:
    """For every sentence, the group of documents that must not be separated."""
    documents: dict[tuple[str, str], int] = {}
    owners = [documents.setdefault((s.domain, s.document), len(documents)) for s in sentences]
    keys = [normalised(s.text) for s in sentences]
    first: dict[str, int] = {}
    ties = [(first.setdefault(key, owner), owner) for key, owner in zip(keys, owners, strict=True)]
    ties += [
        (owners[i], owners[i + 1])
        for i in range(len(sentences) - 1)
        if owners[i] != owners[i + 1]
        and sentences[i].domain == sentences[i + 1].domain
        and _variants(keys[i], keys[i + 1])
    ]
    rows, columns = np.array(ties).T
    graph = coo_array((np.ones(len(ties)), (rows, columns)), shape=(len(documents), len(documents)))
    labels = connected_components(graph, directed=False)[1]
    return [int(labels[owner]) for owner in owners]


def _variants(one: str, other: str) -> bool:
    """Whether half of the words are common: the corpus has 200 made-up tweets, in runs of variants of one text."""
    a, b = set(one.split()), set(other.split())
    return 2 * len(a & b) >= len(a | b)
