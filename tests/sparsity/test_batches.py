"""Batches drawn from a task: seeded, from the rows asked for, and remembered."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.sparsity.batches import Batches
from hadamard_toolkit.sparsity.scores import SCORERS, Scene, scoring
from tests.architectures import tiny_batch, tiny_config
from tests.sparsity.tiny import attached
from tests.training.test_question_answering import encode, span_task
from tests.training.tiny import GOOD, tiny_bert, tiny_task, tiny_tokenizer


def drawn(**choices: Any) -> Batches:
    return ht.draw_batches(tiny_task(), tiny_tokenizer(), **{"examples": 20, "batch_size": 8, **choices})


def texts(batches: Batches) -> set[tuple[int, ...]]:
    return {tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"]}


def test_the_seed_draws_and_the_record_remembers() -> None:
    batches = drawn(seed=4)
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert batches.examples == 20
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}
    record = batches.record()
    assert record == drawn(seed=4).record() != drawn(seed=5).record()
    assert (record["data_seed"], record["task"], record["batches"], record["examples"]) == (4, "tiny", 3, 20)
    assert (record["batch_size"], record["max_length"]) == (8, 128)
    assert texts(drawn(seed=4)) != texts(drawn(seed=5))
    masks = ht.sparsify(attached(), scorer="snip", sparsity=0.5, batches=batches)
    assert masks.data_seed == 4
    assert masks.provenance["rows_sha256"] == record["rows_sha256"]


def test_what_a_seed_draws_never_changes() -> None:
    record = ht.draw_batches(tiny_task(), tiny_tokenizer(), examples=6, batch_size=4).record()
    assert (record["data_seed"], record["batch_size"], record["max_length"]) == (0, 4, 128)
    assert record["rows_sha256"].startswith("8bc6ffd7d606b84285458af1df46d5c4")
    whole = ht.draw_batches(tiny_task(train=400), tiny_tokenizer())
    assert (whole.examples, whole.record()["batch_size"]) == (320, 32)


def test_rows_limit_the_draw_and_batches_hold_like_lengths() -> None:
    pool = range(10, 40)
    allowed = texts(drawn(rows=pool, examples=30))
    assert texts(drawn(rows=pool, seed=9)) <= allowed
    lengths = [batch["attention_mask"].sum(1) for batch in drawn()]
    assert all(a.max() <= b.min() for a, b in pairwise(lengths))


def test_bad_draws_are_refused() -> None:
    with pytest.raises(ArgumentError, match="examples=97 is not allowed; there are 96 training rows"):
        drawn(examples=97)
    with pytest.raises(ArgumentError, match="examples=31 is not allowed; there are 30"):
        drawn(examples=31, rows=range(30))
    with pytest.raises(ArgumentError, match="batch_size=0"):
        drawn(batch_size=0)
    good = {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.zeros(1)}
    with pytest.raises(DataError, match=r"batches\[1\] is empty"):
        Batches.of([good, {**good, "labels": torch.zeros(0)}])
    with pytest.raises(DataError, match=r"batches\[0\] is Tensor"):
        Batches.of([torch.ones(2)])  # type: ignore[list-item]


def test_spans_are_drawn_as_windows() -> None:
    """All windows of the questions drawn, with the places that training points at."""
    task, tokenizer = span_task(), tiny_tokenizer()
    batches = ht.draw_batches(task, tokenizer, examples=12, batch_size=8, seed=3, max_length=16, stride=4)
    rows = task.splits["train"].select(np.sort(np.random.default_rng([3, 2]).permutation(96)[:12]))
    questions = encode(rows, tokenizer)
    assert batches.examples == len(questions) > 12
    assert set(batches[0]) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    order = np.argsort(questions.lengths, kind="stable")
    for name, column in (("start_positions", 0), ("end_positions", 1)):
        drawn_places = torch.cat([batch[name] for batch in batches])
        assert drawn_places.tolist() == questions.labels[order, column].tolist()
    for batch in batches:
        for ids, start, end in zip(
            *(batch[n] for n in ("input_ids", "start_positions", "end_positions")), strict=True
        ):
            assert start == end
            assert tokenizer.convert_ids_to_tokens(int(ids[start])) in ("[CLS]", *GOOD)
    record = batches.record()
    assert (record["questions"], record["examples"], record["stride"]) == (12, len(questions), 4)


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
def test_spans_drawn_from_a_task_are_scored_by_their_loss(scorer: str) -> None:
    """|θ ∂L/∂θ| and θ H g of the mean over windows of (start + end cross-entropy) / 2, by hand."""
    model = tiny_bert(head="span").eval()
    attachment = ht.attach(model, ht.Houlsby(bottleneck=2, init="normal", activation="gelu", layers=(0,)))
    batches = ht.draw_batches(
        span_task(), tiny_tokenizer(), examples=6, batch_size=4, max_length=16, stride=4
    )
    own = {n: p for n, p in attachment.named_parameters("adapter").items() if n.endswith(".weight")}

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for batch in batches:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for logits, name in (
                (output.start_logits, "start_positions"),
                (output.end_logits, "end_positions"),
            ):
                total = total - logits.log_softmax(-1).gather(1, batch[name][:, None]).sum() / 2
        return total / batches.examples

    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(loss(), list(own.values()), create_graph=True)
        if scorer == "grasp":
            along = sum(((g * g.detach()).sum() for g in first), torch.zeros(()))
            first = torch.autograd.grad(along, list(own.values()))
    expected = {name: own[name].detach() * g.detach() for name, g in zip(own, first, strict=True)}
    if scorer == "snip":
        expected = {name: value.abs() for name, value in expected.items()}
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in own.items()}
    with scoring(attachment, list(own.values())):
        found = SCORERS[scorer].score(Scene(attachment, own, kept, batches, 0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)
    masks = ht.sparsify(attachment, scorer=scorer, sparsity=0.5, batches=batches, scope="tensor")
    assert masks.removed == masks.entries // 2


def test_batches_of_spans_can_be_scored() -> None:
    model = ht.backbone_from_config(tiny_config("bert"), head="span").eval()
    attachment = ht.attach(model, ht.Houlsby(bottleneck=4, init="normal", activation="gelu"))
    positions = torch.tensor([1, 2, 3])
    batch = {**tiny_batch(3), "start_positions": positions, "end_positions": positions + 1}
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=[batch], scope="tensor")
    assert (masks.removed, masks.provenance["examples"]) == (masks.entries // 2, 3)
