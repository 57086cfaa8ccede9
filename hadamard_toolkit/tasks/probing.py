"""Three probing tasks over the rated sentences: where a text is from, whether its words are in order, what comes next.

In the manner of Conneau et al. (2018, bigram shift) and of next-sentence prediction (Devlin et al. 2019). Each function
takes the sentences of one split and gives its rows; a row depends on nothing outside its split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from hadamard_toolkit.tasks.vader import FILES, Sentence, normalised, rank, without_masks

Row = dict[str, Any]
DOMAINS = tuple(FILES)
WORDS = range(5, 31)


def domain_rows(sentences: Iterable[Sentence]) -> list[Row]:
    """Which of `DOMAINS` a text is from; as many of each. Stand-ins for users and addresses (tweets) are taken out."""
    unique = {(normalised(s.text), s.domain): s for s in sentences if without_masks(s.text)}
    shared = Counter(text for text, _ in unique)
    pools: dict[str, list[Sentence]] = {domain: [] for domain in DOMAINS}
    for (text, domain), sentence in unique.items():
        if shared[text] == 1:
            pools[domain].append(sentence)
    size = min(map(len, pools.values()))
    rows = [
        {"text": without_masks(s.text), "label": DOMAINS.index(domain), **_origin(s)}
        for domain, pool in pools.items()
        for s in sorted(pool, key=lambda s: rank("domain", s.text))[:size]
    ]
    return _shuffled(rows, "text")


def order_rows(sentences: Iterable[Sentence]) -> list[Row]:
    """Is a sentence intact (1), or were two neighbouring words swapped (0); half and half in every domain.

    Both kinds come from the same pool: sentences of `WORDS` words that have a pair of neighbours of letters only, not
    first in the sentence, that differ. So neither case nor punctuation gives the swap away. A sentence occurs in one
    version only.
    """
    unique = {normalised(s.text): s for s in sentences if len(s.text.split()) in WORDS and swappable(s.text)}
    rows: list[Row] = []
    for domain in DOMAINS:
        pool = sorted((s for s in unique.values() if s.domain == domain), key=lambda s: rank("order", s.text))
        for place, sentence in enumerate(pool[: len(pool) // 2 * 2]):
            text = sentence.text if place % 2 else swapped(sentence.text)
            rows.append({"text": text, "label": place % 2, **_origin(sentence)})
    return _shuffled(rows, "text")


def swappable(text: str) -> list[int]:
    """Places i >= 1 where words i and i + 1 may change places."""
    words = text.split()
    return [
        i
        for i in range(1, len(words) - 1)
        if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()
    ]


def swapped(text: str) -> str:
    """The text with two neighbouring words swapped, at a place that its own characters choose."""
    words, places = text.split(), swappable(text)
    i = places[int.from_bytes(rank("swap", text)[:4]) % len(places)]
    return " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])


def following_rows(sentences: Iterable[Sentence]) -> list[Row]:
    """Does sentence 2 follow sentence 1 in its document (1) or not (0); editorials and product reviews.

    Every sentence 1 and every sentence 2 occurs once under each label, so neither alone tells anything. In about half
    of the documents the wrong sentence 2 is from the same document, in the others from another one (column
    `contrast`).
    """
    rows: list[Row] = []
    pool = [s for s in sentences if s.domain in ("products", "editorials")]
    for domain in ("products", "editorials"):
        documents = list(_successions(s for s in pool if s.domain == domain))
        inside = [(pairs, turn) for pairs in documents if (turn := _inner_turn(pairs))]
        outside = [pairs for pairs in documents if not _inner_turn(pairs)]
        for pairs, turn in inside:
            rows += _contrasted(pairs, turn, "same document")
        rows += _contrasted(
            [pair for pairs in outside for pair in pairs], max(map(len, outside), default=0), "other document"
        )
    return _shuffled(rows, "sentence1", "sentence2")


Pair = tuple[Sentence, Sentence]


def _successions(sentences: Iterable[Sentence]) -> Iterator[list[Pair]]:
    """For every document, in random order, its pairs of neighbours; a text that was seen before starts or ends none."""
    documents: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        documents.setdefault(sentence.document, []).append(sentence)
    firsts: set[str] = set()
    seconds: set[str] = set()
    for document in sorted(documents, key=lambda d: rank("document", d)):
        pairs = []
        ordered = documents[document]
        for a, b in pairwise(ordered):
            one, two = normalised(a.text), normalised(b.text)
            if b.number == a.number + 1 and one != two and one not in firsts and two not in seconds:
                firsts.add(one)
                seconds.add(two)
                pairs.append((a, b))
        if pairs:
            yield pairs


def _inner_turn(pairs: list[Pair]) -> int:
    """By how many places the seconds of a document turn to be wrong; 0 where the document takes another's.

    Seconds are different texts, so any turn but 0 separates a first from its second; it must not meet itself either.
    """
    size, document = len(pairs), pairs[0][0].document
    if rank("contrast", document)[0] % 2:
        return 0
    starts = sorted(range(1, size), key=lambda turn: rank("turn", document, turn))
    return next((turn for turn in starts if not _meets_itself(pairs, turn)), 0)


def _meets_itself(pairs: list[Pair], turn: int) -> bool:
    seconds = _turned(pairs, turn)
    return any(normalised(a.text) == normalised(b.text) for (a, _), b in zip(pairs, seconds, strict=True))


def _turned(pairs: list[Pair], turn: int) -> list[Sentence]:
    seconds = [b for _, b in pairs]
    return seconds[turn:] + seconds[:turn]


def _contrasted(pairs: list[Pair], turn: int, contrast: str) -> Iterator[Row]:
    for (first, second), wrong in zip(pairs, _turned(pairs, turn), strict=True):
        for label, other in ((1, second), (0, wrong)):
            yield {
                "sentence1": first.text,
                "sentence2": other.text,
                "label": label,
                **_origin(first),
                "document2": _origin(other)["document"],
                "contrast": contrast,
            }


def _origin(sentence: Sentence) -> Row:
    return {"domain": sentence.domain, "document": f"{sentence.domain}/{sentence.document}"}


def _shuffled(rows: list[Row], *columns: str) -> list[Row]:
    return sorted(rows, key=lambda row: rank("row", *(row[column] for column in columns)))
