"""Answers that are spans: windows over long contexts, the best span, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks import Task, load_task
from hadamard_toolkit.tasks.base import in_memory
from hadamard_toolkit.training.evaluation import inputs_of, open_accelerator
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.question_answering import (
    LONGEST_ANSWER,
    Questions,
    Spans,
    _best_windows,
    best_spans,
)
from hadamard_toolkit.training.squad_metrics import compare, normalise
from tests.local_data import local_data
from tests.training.tiny import FILLER, GOOD, tiny_bert, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COLUMNS = ("question", "context")
WINDOWS = Protocol(max_length=16, stride=4)


def asked(*rows: tuple[str, str, str]) -> Dataset:
    """Rows of question, context and answer (where it first occurs)."""
    return in_memory(
        pa.Table.from_pylist(
            [
                {
                    "id": f"q{number}",
                    "question": question,
                    "context": context,
                    "answers": {"text": [answer], "answer_start": [context.index(answer)]},
                }
                for number, (question, context, answer) in enumerate(rows)
            ]
        )
    )


def good_word(count: int, seed: int) -> Dataset:
    """Which word is good? A context of up to three windows holds one."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        words = chance.choices(FILLER, k=chance.randint(4, 24))
        answer = chance.choice(GOOD)
        words.insert(chance.randint(0, len(words)), answer)
        rows.append(("the film", " ".join(words), answer))
    return asked(*rows)


def span_task(train_rows: int = 96, test_rows: int = 24) -> Task:
    splits = DatasetDict(train=good_word(train_rows, 0), test=good_word(test_rows, 1))
    return Task("good-word", splits, COLUMNS, "span", (), "f1", metrics=("f1", "exact-match"))


def encode(rows: Dataset, tokenizer: Any = TOKENIZER, protocol: Protocol = WINDOWS) -> Questions:
    return Spans(COLUMNS, tokenizer, protocol).encode(rows)


# windows -----------------------------------------------------------------------------------------------------------


def test_windows_share_the_stride_and_cover_the_context() -> None:
    context = " ".join((FILLER * 3)[:25])
    questions = encode(asked(("the film", context, "film")))
    encoded = TOKENIZER(context, return_offsets_mapping=True, add_special_tokens=False)
    every = [tuple(offset) for offset in encoded["offset_mapping"]]
    starts = [every.index(tuple(window[0])) for window in questions.offsets]
    sizes = [len(window) for window in questions.offsets]
    assert max(questions.lengths) == 16
    assert starts == [number * (sizes[0] - 4) for number in range(len(starts))]
    assert starts[-1] + sizes[-1] == len(every)
    assert sizes[0] == 16 - len(["[CLS]", "the", "film", "[SEP]"])
    for window, (_, _, begin, end) in enumerate(questions.labels):
        assert end - begin == sizes[window]


def test_windows_hold_the_answer_or_point_at_cls() -> None:
    words = ["day"] * 20
    words[3], words[18] = "warm", "fine"
    questions = encode(asked(("the film", " ".join(words), "fine"), ("the film", " ".join(words), "warm")))
    for window, (first, last, begin, end) in enumerate(questions.labels):
        ids = questions.inputs["input_ids"][window]
        wanted = TOKENIZER.convert_tokens_to_ids(["fine", "warm"][questions.owner[window]])
        if wanted in ids[begin:end]:
            assert first == last
            assert ids[first] == wanted
        else:
            assert (first, last, ids[first]) == (0, 0, TOKENIZER.cls_token_id)
    assert {
        (owner, place > 0) for owner, place in zip(questions.owner, questions.labels[:, 0], strict=True)
    } == {
        (0, True),
        (0, False),
        (1, True),
        (1, False),
    }


def test_a_context_that_fits_is_one_window_and_selection_keeps_windows_together() -> None:
    short, long = ("the film", "a warm day", "warm"), ("the film", " ".join(["day"] * 24 + ["fine"]), "fine")
    questions = encode(asked(short, long, short))
    counts = np.bincount(questions.owner).tolist()
    assert counts[0] == counts[2] == 1
    assert counts[1] > 1
    swapped = questions.select([1, 0])
    assert swapped.ids == ["q1", "q0"]
    assert np.bincount(swapped.owner).tolist() == [counts[1], 1]
    assert swapped.contexts[1] == "a warm day"
    assert np.array_equal(swapped.inputs["input_ids"][-1], questions.inputs["input_ids"][0])
    assert np.array_equal(swapped.labels[-1], questions.labels[0])


def test_a_long_question_is_cut_and_leaves_the_windows_a_way_forward() -> None:
    questions = encode(asked((" ".join(["film"] * 60), " ".join(["day"] * 24 + ["fine"]), "fine")))
    begins = questions.labels[:, 2]
    assert (begins <= 1 + (16 - 4) // 2).all()
    assert (questions.labels[:, 0] > 0).any()


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ArgumentError, match="max_length=16 is not allowed with stride=14; it must be >= 18"):
        encode(asked(("the", "a warm day", "warm")), protocol=Protocol(max_length=16, stride=14))
    with pytest.raises(ArgumentError, match="stride=16 is not allowed; it must be >= 0 and < 16"):
        Protocol(max_length=16, stride=16)


def test_rows_without_answers_are_refused() -> None:
    with pytest.raises(DataError, match="needs a column 'answers'"):
        encode(asked(("the", "a warm day", "warm")).remove_columns("answers"))


# the best span -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_best_span_is_the_best_of_all(length: int, longest: int, seed: int, whole: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 3, length, generator=generator)
    begin = 0 if whole else seed % length
    bounds = torch.tensor([[begin, length]] * 3)
    for row, (first, last, score) in enumerate(best_spans(start, end, bounds, longest).tolist()):
        every = [
            (float(start[row, i] + end[row, j]), i, j)
            for i in range(begin, length)
            for j in range(i, min(length, i + longest))
        ]
        assert (score, first, last) == pytest.approx(max(every))


def test_an_answer_has_thirty_tokens_at_most() -> None:
    start, end, bounds = torch.zeros(2, 40), torch.zeros(2, 40), torch.tensor([[0, 40], [0, 40]])
    start[:, 2] = 9.0
    end[0, 31], end[1, 32] = 9.0, 9.0  # thirty tokens, and one too many
    assert best_spans(start, end, bounds)[0].tolist() == [2, 31, 18]
    assert best_spans(start, end, bounds)[1, 2] == 9


def test_windows_share_a_third_of_their_length_unless_told_otherwise() -> None:
    assert Spans(COLUMNS, TOKENIZER, Protocol(max_length=18)).stride == 6
    assert Spans(COLUMNS, TOKENIZER, Protocol(max_length=18, stride=0)).stride == 0


def test_of_equal_windows_the_first_answers_and_the_loss_is_their_mean() -> None:
    context = " ".join(["fine"] * 30)
    questions = encode(asked(("the film", context, "fine")))
    windows = len(questions)
    assert windows > 1
    begins = questions.labels[:, 2]
    found = np.stack([begins, begins, np.full(windows, 7.0), np.arange(windows)], axis=1)
    [row] = _best_windows(questions, found)
    assert row.tolist() == [0, 4, 7, (windows - 1) / 2]


def test_the_loss_of_a_window_is_the_mean_of_start_and_end() -> None:
    kind = Spans(COLUMNS, TOKENIZER, WINDOWS)
    questions = kind.encode(good_word(4, 0))
    source = kind.source(questions)
    model = tiny_bert(head="span").eval()
    predicted = kind.predict(open_accelerator(WINDOWS), model, source, 64)
    [batch] = list(source.evaluation(64))
    with torch.no_grad():
        output = model(**inputs_of(batch))
    losses = [
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, side], reduction="none")
        for side, logits in enumerate((output.start_logits, output.end_logits))
    ]
    by_window = torch.stack(losses).mean(0)
    owners = questions.owner[batch["row"].numpy()]
    for question in range(4):
        assert predicted[question, 3] == pytest.approx(float(by_window[owners == question].mean()), abs=1e-5)


def test_a_row_without_room_scores_minus_infinity() -> None:
    assert best_spans(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[2, 2]])).tolist()[0][2] == -np.inf


class Oracle(nn.Module):
    """A model that knows where the answer is, in the windows that hold it; elsewhere it is unsure."""

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        pairs = zip(questions.inputs["input_ids"], questions.labels[:, :2].tolist(), strict=True)
        self.known = {tuple(ids.tolist()): places for ids, places in pairs}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(2, *input_ids.shape)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            for side, place in enumerate(self.known[tuple(ids[mask.bool()].tolist())]):
                logits[side, row, place] = 9.0  # at [CLS], outside the context, where the windows lack it
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])


def oracle_predictions(kind: Spans, questions: Questions) -> np.ndarray:
    return kind.predict(open_accelerator(Protocol()), Oracle(questions), kind.source(questions), 32)


def test_predictions_are_the_places_of_the_best_window() -> None:
    kind, rows = Spans(COLUMNS, TOKENIZER, WINDOWS), good_word(30, 3)
    questions = kind.encode(rows)
    predicted = oracle_predictions(kind, questions)
    assert np.array_equal(predicted[:, :2], kind.truth(questions))
    answers, scores = kind.by_row(predicted, questions)
    assert answers == {row["id"]: row["answers"]["text"][0] for row in rows}
    assert scores["f1"].min() == 1
    assert kind.score(("f1", "exact-match"), predicted, questions) == {
        "f1": 1.0,
        "exact-match": 1.0,
        "loss": pytest.approx(predicted[:, 3].mean()),
    }


# real questions ----------------------------------------------------------------------------------------------------


def test_real_gold_answers_score_as_the_official_rules_say() -> None:
    rows = load_task("squad", root=local_data("squad")).splits["test"]
    golds = [answers["text"] for answers in rows["answers"]]
    for choose in (lambda given: given[0], lambda given: given[-1], lambda given: f"The {given[0]}!"):
        answers = [choose(given) for given in golds]
        found = compare(answers, golds)
        assert found["exact-match"].min() == 1
        assert (
            found["f1"][[bool(normalise(answer)) for answer in answers]].min() == 1
        )  # one gold answer is "."
    # People among themselves: the last answer against the others.
    pairs = [(given[-1], given[:-1]) for given in golds if len(given) > 1]
    human = compare([one for one, _ in pairs], [others for _, others in pairs])
    assert human["exact-match"].mean() == pytest.approx(0.811, abs=1e-3)
    assert human["f1"].mean() == pytest.approx(0.911, abs=1e-3)


def test_real_answers_round_trip_through_the_windows(minilm: Callable[..., Any]) -> None:
    rows = load_task("squad", root=local_data("squad"), limit={"test": 400}).splits["test"]
    _, tokenizer = minilm(head="span")
    kind = Spans(COLUMNS, tokenizer, Protocol(max_length=128, stride=48))
    questions = kind.encode(rows)
    assert len(questions) > len(rows)
    predicted = oracle_predictions(kind, questions)
    answers, scores = kind.by_row(predicted, questions)
    golds = [context[a:b] for context, (a, b) in zip(questions.contexts, questions.truth, strict=True)]
    short = np.array([len(tokenizer.tokenize(gold)) <= LONGEST_ANSWER for gold in golds])
    assert short.mean() > 0.98
    assert (
        scores["exact-match"][short].mean() > 0.99
    )  # an answer inside a token ("7" of "7th") comes back whole
    for gold, answer, fits in zip(golds, answers.values(), short, strict=True):
        assert not fits or gold.strip() in answer


# whole runs --------------------------------------------------------------------------------------------------------

SHORT = Protocol(
    learning_rate=5e-3,
    epochs=4,
    batch_size=16,
    eval_batch_size=32,
    max_length=16,
    stride=4,
    validation_rows=16,
)


def test_a_span_head_learns_through_the_same_loop() -> None:
    task = span_task(192, 40)
    model = tiny_bert(head="span", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    outcome = train(
        ht.attach(model, ht.FullFineTuning()), task, TOKENIZER, dataclasses.replace(SHORT, epochs=6)
    )
    assert outcome.metrics["test"]["exact-match"] > 0.9
    assert outcome.metrics["test"]["f1"] >= outcome.metrics["test"]["exact-match"]
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"]
    assert {"eval_f1", "eval_exact-match", "eval_loss"} <= set(outcome.history[0])
    rows = task.splits["test"]
    assert set(outcome.answers["test"]) == set(rows["id"])
    for row, (start, stop), exact in zip(
        rows,
        outcome.predictions["test"][:, :2].astype(int),
        outcome.scores["test"]["exact-match"],
        strict=True,
    ):
        assert outcome.answers["test"][row["id"]] == row["context"][start:stop]
        assert exact == (row["context"][start:stop] == row["answers"]["text"][0])
    assert outcome.metrics["test"]["exact-match"] == pytest.approx(
        outcome.scores["test"]["exact-match"].mean()
    )
    json.dumps([outcome.metrics, outcome.history, outcome.details, outcome.answers])


@pytest.mark.parametrize(
    "adapter", [ht.Hadamard(), ht.PromptTuning(length=3), ht.PrefixTuning(length=3), ht.HeadOnly()]
)
def test_two_stages_train_the_head_through_the_backbone_and_say_why(adapter: Any) -> None:
    attachment = ht.attach(tiny_bert(head="span"), adapter)
    protocol = dataclasses.replace(SHORT, head="first-then-frozen", head_epochs=1, epochs=1)
    outcome = train(attachment, span_task(48, 12), TOKENIZER, protocol)
    assert outcome.details["stage_one"] == "full"
    assert "span tasks reads every token" in outcome.details["fallback"]
    assert outcome.predictions["test"].shape == (12, 4)
    assert np.isfinite(outcome.predictions["test"]).all()


def test_heads_and_tasks_must_be_of_one_kind() -> None:
    with pytest.raises(ArgumentError, match="needs 2 of a span head"):
        train(ht.attach(tiny_bert(), ht.HeadOnly()), span_task(), TOKENIZER, SHORT)
    task = Task(
        "flat", DatasetDict({s: in_memory({"text": ["a", "b"], "label": [0, 1]}) for s in ("train", "test")}),
        ("text",), "classification", ("no", "yes"), "accuracy",
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="needs 2 of a classification head"):
        train(ht.attach(tiny_bert(head="span"), ht.HeadOnly()), task, TOKENIZER, SHORT)


def test_a_stored_run_keeps_answers_and_scores_instead_of_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tmp_path / "backbone"
    tiny_bert().base_model.save_pretrained(backbone)
    TOKENIZER.save_pretrained(backbone)
    (tmp_path / "data" / "squad").mkdir(parents=True)
    for stem, rows in (("train", good_word(48, 0)), ("dev", good_word(12, 1))):
        pq.write_table(rows.with_format("arrow")[:], tmp_path / "data" / "squad" / f"{stem}.parquet")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    spec = RunSpec(str(backbone), "squad", ht.Hadamard(), dataclasses.replace(SHORT, epochs=1))
    assert spec.to_dict()["protocol"]["stride"] == 4
    assert RunSpec.from_dict(spec.to_dict()) == spec
    done = run(spec, RunStore(tmp_path / "runs"))
    again = RunStore(tmp_path / "runs").run(spec.key)
    assert again.answers == done.answers
    assert set(again.answers["test"]) == {f"q{number}" for number in range(12)}
    stored = again.predictions["test"]
    assert {name: (array.shape, array.dtype.name) for name, array in stored.items()} == {
        "span": ((12, 2), "int32"),
        "score": ((12,), "float32"),
        "exact-match": ((12,), "float32"),
        "f1": ((12,), "float32"),
        "labels": ((12, 2), "int64"),
        "rows": ((12,), "int64"),
    }
    assert again.metrics["test"]["f1"] == pytest.approx(stored["f1"].mean())
    table = RunStore(tmp_path / "runs").load()
    assert set(table["metric"]) == {"f1", "exact-match", "loss"}
    _, _, attachment = again.restore()
    assert attachment.model.qa_outputs.out_features == 2
