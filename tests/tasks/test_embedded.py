"""The embedded suite: what its splits and its probing tasks promise, and that its data card tells the truth."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.errors import ArgumentError, DownloadError
from hadamard_toolkit.tasks import TASKS, Task, load_task
from hadamard_toolkit.tasks.embedded import polarity
from hadamard_toolkit.tasks.probing import swappable, swapped
from hadamard_toolkit.tasks.vader import FILES, Sentence, corpus, normalised, parse, split_by_document

NAMES = [name for name in TASKS if name.startswith("embedded/")]
# Of every row of every task: changes with the texts, the labels, the split, or the order.
CONTENT = "3136d9f9d8c6ebed6096441a47994a2193a6f10f4fdd7a586ad0965ff4b7d452"


@pytest.fixture(scope="module")
def suite() -> dict[str, Task]:
    try:
        return {name: load_task(name) for name in NAMES}
    except DownloadError as missing:
        pytest.fail(f"the embedded data are not in the cache; run `make setup` ({missing})")


def _texts(task: Task, split: str) -> list[str]:
    return [text for column in task.text_columns for text in task.splits[split][column]]


def test_the_corpus_is_read_whole(suite: dict[str, Task]) -> None:
    sentences = corpus()
    assert Counter(s.domain for s in sentences) == {
        "tweets": 4200,
        "movies": 10605,
        "products": 3708,
        "editorials": 5190,
    }
    assert all(-4 <= s.rating <= 4 and s.text.strip() for s in sentences)
    assert not any(re.search(r"&#?\w+;|\s\s|[\r\n\t]", s.text) for s in sentences)


def test_no_document_and_no_text_crosses_splits_in_any_task(suite: dict[str, Task]) -> None:
    of_document: dict[str, set[str]] = {}
    of_text: dict[str, set[str]] = {}
    for task in suite.values():
        for split, rows in task.splits.items():
            for column in {"document", "document2"} & set(rows.column_names):
                for document in rows[column]:
                    of_document.setdefault(document, set()).add(split)
            if (
                task.name != "embedded/word-order"
            ):  # its swapped texts are new ones; its documents are checked
                for text in _texts(task, split):
                    of_text.setdefault(normalised(text), set()).add(split)
    assert not [document for document, splits in of_document.items() if len(splits) > 1]
    assert not [text for text, splits in of_text.items() if len(splits) > 1]


def test_shares_of_the_split() -> None:
    for domain in FILES:
        counts = Counter(s.split for s in corpus() if s.domain == domain)
        shares = {split: counts[split] / counts.total() for split in counts}
        assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)


def test_content_is_the_recorded_one(suite: dict[str, Task]) -> None:
    digest = hashlib.sha256()
    for task in suite.values():
        for rows in task.splits.values():
            for row in rows:
                digest.update(repr(sorted(row.items())).encode())
    assert digest.hexdigest() == CONTENT


@pytest.mark.parametrize("domain", FILES)
def test_polarity_and_intensity_follow_the_ratings(suite: dict[str, Task], domain: str) -> None:
    rated, signed = suite[f"embedded/{domain}-intensity"], suite[f"embedded/{domain}-polarity"]
    assert (rated.metrics, signed.metrics) == (("spearman", "pearson"), ("accuracy", "f1"))
    for split in rated.splits:
        ratings = np.array(rated.splits[split]["rating"])
        assert np.allclose(rated.splits[split]["label"], ratings)
        kept = ratings[np.abs(ratings) >= 0.5]
        assert signed.splits[split]["label"][:] == (kept > 0).astype(int).tolist()
    assert signed.labels == ("negative", "positive")


@pytest.mark.parametrize("name", ["domain-identification", "word-order", "next-sentence"])
def test_probing_tasks_are_balanced(suite: dict[str, Task], name: str) -> None:
    task = suite[f"embedded/{name}"]
    for rows in task.splits.values():
        assert len(set(Counter(rows["label"]).values())) == 1
        assert len(Counter(rows["label"])) == task.n_labels


def test_domain_texts_carry_no_masks(suite: dict[str, Task]) -> None:
    task = suite["embedded/domain-identification"]
    for split, rows in task.splits.items():
        texts = _texts(task, split)
        assert not [text for text in texts if "@anonymous" in text or "http://url_removed" in text]
        assert len({normalised(text) for text in texts}) == len(texts)
        assert [task.labels[label] for label in rows["label"]] == rows["domain"][:]


def test_probing_labels_are_named_in_the_order_of_their_numbers(suite: dict[str, Task]) -> None:
    assert suite["embedded/word-order"].labels == ("swapped", "intact")
    assert suite["embedded/next-sentence"].labels == ("unrelated", "follows")
    assert suite["embedded/domain-identification"].labels == tuple(FILES)


def test_every_swapped_sentence_is_one_swap_from_a_corpus_sentence(suite: dict[str, Task]) -> None:
    originals = {s.text for s in corpus()}
    for rows in suite["embedded/word-order"].splits.values():
        bags = Counter(tuple(sorted(text.split())) for text in rows["text"])
        assert max(bags.values()) <= 2  # a sentence is there once; a few are anagrams of another
        for text, label in zip(rows["text"], rows["label"], strict=True):
            words = text.split()
            assert 5 <= len(words) <= 30
            if label:
                assert text in originals
            else:
                back = (
                    [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
                    for i in range(1, len(words) - 1)
                    if words[i].isalpha() and words[i + 1].isalpha()
                )
                assert any(" ".join(candidate) in originals for candidate in back)


@given(st.lists(st.sampled_from(["a", "b", "Ab", "c,", "d.", "e"]), min_size=3, max_size=9).map(" ".join))
def test_a_swap_keeps_the_words_and_moves_two_neighbours(text: str) -> None:
    words = text.split()
    places = swappable(text)
    assert all(0 < i < len(words) - 1 for i in places)
    if places:
        new = swapped(text).split()
        changed = [i for i, (a, b) in enumerate(zip(words, new, strict=True)) if a != b]
        assert sorted(new) == sorted(words)
        assert changed == [changed[0], changed[0] + 1]
        assert changed[0] in places


def test_next_sentence_cannot_be_solved_from_one_half(suite: dict[str, Task]) -> None:
    follower: dict[tuple[str, str], set[str]] = {}
    ordered = corpus()
    for a, b in pairwise(ordered):
        if (a.domain, a.document, a.number + 1) == (b.domain, b.document, b.number):
            follower.setdefault((f"{a.domain}/{a.document}", a.text), set()).add(b.text)
    for rows in suite["embedded/next-sentence"].splits.values():
        halves: dict[str, dict[int, Counter]] = {
            c: {0: Counter(), 1: Counter()} for c in ("sentence1", "sentence2")
        }
        for row in rows:
            for column, counts in halves.items():
                counts[row["label"]][row[column]] += 1
            true = follower[row["document"], row["sentence1"]]
            assert (row["sentence2"] in true) == bool(row["label"])
            assert normalised(row["sentence1"]) != normalised(row["sentence2"])
            same = row["document"] == row["document2"]
            assert same == (row["label"] == 1 or row["contrast"] == "same document")
        for counts in halves.values():
            assert counts[0] == counts[1]
        assert 0.3 < Counter(rows["contrast"])["same document"] / rows.num_rows < 0.7


def test_the_data_card_tells_the_truth(suite: dict[str, Task], repository: Path) -> None:
    card = (repository / "data" / "README.md").read_text()
    found = re.findall(
        r"^\| `(embedded/\S+)` \| (\d+) \| (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \|$", card, re.M
    )
    said = {
        name: ([int(train), int(held), int(test)], metrics, balance)
        for name, train, held, test, metrics, balance in found
    }
    assert said == {
        name: (
            [task.splits[s].num_rows for s in ("train", "validation", "test")],
            ", ".join(task.metrics),
            _balance(task.splits),
        )
        for name, task in suite.items()
    }
    documents = Counter(domain for domain, _ in {(s.domain, s.document) for s in corpus()})
    texts = Counter(s.domain for s in corpus())
    for domain in FILES:
        assert f"| {domain} | {texts[domain]} | {documents[domain]} |" in card


def _balance(splits: DatasetDict) -> str:
    columns = [np.array(splits[split]["label"]) for split in ("train", "validation", "test")]
    if columns[0].dtype.kind == "f":
        return "mean " + " / ".join(f"{labels.mean():.2f}" for labels in columns)
    shares = [f"{100 * (labels == 1).mean():.1f}" for labels in columns]
    return "balanced" if shares[0] in ("50.0", "25.0") else f"{' / '.join(shares)} % positive"


@pytest.mark.glue
def test_the_overlap_of_movies_and_sst2_is_the_stated_one(suite: dict[str, Task], glue_root: Path) -> None:
    def letters(text: str) -> str:
        return re.sub(r"\W+", "", text.lower())

    movies = {letters(s.text) for s in corpus() if s.domain == "movies"}
    hits = [
        text
        for text in load_task("sst2", root=glue_root).splits["test"]["sentence"]
        if letters(text) in movies
    ]
    assert f"{len(hits)} of the 872" in suite["embedded/movies-polarity"].provenance["note"]


def test_parsing_resolves_entities_and_leaves_out_empty_texts() -> None:
    lines = "1_1\t-0.5\tfish &amp;amp;  chips &lt;3\r\n1_2\t0.1\t \r\n2_1\t3\tgood\r\n"
    assert list(parse("products", lines)) == [
        Sentence("products", "1", 1, "fish & chips <3", -0.5),
        Sentence("products", "2", 1, "good", 3.0),
    ]


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from("abcdefgh")), min_size=1, max_size=60))
def test_any_corpus_is_split_by_document_and_text(rows: list[tuple[int, str]]) -> None:
    made = [
        Sentence("products", str(document), i, f"text {letter}", 0.0)
        for i, (document, letter) in enumerate(rows)
    ]
    for key in ("document", "text"):
        owners: dict[str, set[str]] = {}
        for sentence in split_by_document(made):
            owners.setdefault(getattr(sentence, key), set()).add(sentence.split)
        assert all(len(splits) == 1 for splits in owners.values())


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ArgumentError, match="domain='letters' is not allowed"):
        polarity("letters")


def test_no_network_and_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"vaderSentiment-3\.3\.2\.tar\.gz is not in the cache folder"):
        load_task("embedded/word-order")


def test_variants_of_one_text_in_neighbouring_documents_stay_together() -> None:
    """The corpus has made-up tweets in runs; half of the words in common ties two of them, fewer do not."""

    def splits_of(common: int, second: str = "tweets") -> list[tuple[str, str]]:
        texts = [(" ".join(f"w{k}{c}" for c in "abc"), k) for k in range(60)]
        made = []
        for text, k in texts:
            words = text.split()[:common] + [f"v{k}{c}" for c in "xyz"[common:]]
            made.append(Sentence("tweets", f"{k} first", 1, text, 0.0))
            made.append(Sentence(second, f"{k} second", 1, " ".join(words), 0.0))
        found = {sentence.document: sentence.split for sentence in split_by_document(made)}
        return [(found[f"{k} first"], found[f"{k} second"]) for k in range(60)]

    assert all(one == other for one, other in splits_of(2)), "2 of 4 words"
    assert len(set(splits_of(2))) == 3
    assert any(one != other for one, other in splits_of(1)), "1 of 5 words"
    assert any(one != other for one, other in splits_of(2, "movies")), (
        "texts of other domains are other texts"
    )
