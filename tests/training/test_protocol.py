from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.training import protocols, stages
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.task_types import Labelled
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

PRESETS = [protocols.hadamard(), protocols.sparse_adapter(), protocols.unipelt(500), protocols.smoke()]


@pytest.mark.parametrize("protocol", PRESETS)
def test_json_round_trip(protocol: Protocol) -> None:
    record = json.loads(json.dumps(protocol.to_dict()))
    assert Protocol.from_dict(record) == protocol
    assert hash(Protocol.from_dict(record)) == hash(protocol)


def test_whole_numbers_and_floats_are_one_protocol() -> None:
    assert json.dumps(Protocol(clip=1, warmup=0, betas=[0, 0.9]).to_dict()) == json.dumps(
        Protocol(clip=1.0, warmup=0.0, betas=(0.0, 0.9)).to_dict()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head", "frozen"),
        ("stage_one", "half"),
        ("frozen_prefix", "half"),
        ("schedule", "cosine"),
        ("select", "worst"),
        ("precision", "fp16"),
        ("epochs", 0),
        ("head_epochs", 2.5),
        ("batch_size", "32"),
        ("eval_batch_size", True),
        ("max_length", 2),
        ("patience", 0),
        ("train_rows", -1),
        ("validation_rows", -1),
        ("test_rows", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("head_learning_rate", "1e-3"),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
        ("clip", 0.0),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("epsilon", 0.0),
        ("validation_rows", 0),
    ],
)
def test_a_bad_value_is_one_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{field}="):
        Protocol(**{field: value})


@pytest.mark.parametrize("make", [Protocol.from_dict, lambda fields: Protocol(**fields)])
def test_an_unknown_field_is_named_and_the_right_one_suggested(make: Any) -> None:
    with pytest.raises(ArgumentError, match=r"field of Protocol='lr' .*Did you mean 'learning_rate'\?$"):
        make({"lr": 1e-3})
    with pytest.raises(ArgumentError, match=r"field of Protocol='epoch' .*Did you mean 'epochs'"):
        make({"epoch": 3})


def test_without_validation_rows_the_last_epoch_is_allowed() -> None:
    assert Protocol(validation_rows=0, select="last").validation_rows == 0


def test_presets_say_what_their_sources_say() -> None:
    sparse = protocols.sparse_adapter()
    assert (sparse.head, sparse.batch_size, sparse.learning_rate, sparse.epochs) == ("trained", 48, 1e-4, 20)
    assert (sparse.weight_decay, sparse.betas, sparse.epsilon, sparse.warmup) == (
        0.1,
        (0.9, 0.98),
        1e-6,
        0.06,
    )
    unipelt = protocols.unipelt(100)
    assert (unipelt.batch_size, unipelt.learning_rate, unipelt.epochs, unipelt.patience) == (16, 5e-4, 50, 10)
    assert (unipelt.max_length, unipelt.train_rows, unipelt.validation_rows) == (128, 100, 1000)
    assert (unipelt.weight_decay, unipelt.warmup, unipelt.head) == (0.0, 0.0, "trained")
    two = protocols.hadamard()
    assert (two.head, two.learning_rate, two.epochs) == ("first-then-frozen", 5e-3, 6)
    assert (two.head_learning_rate, two.head_epochs, two.weight_decay, two.warmup) == (2e-2, 30, 0.0, 0.1)
    full = protocols.full_fine_tuning()
    assert (full.head, full.learning_rate, full.epochs, full.warmup) == ("trained", 1e-4, 6, 0.1)
    squad = protocols.squad()
    assert (squad.max_length, squad.stride, squad.batch_size, squad.epochs) == (384, 128, 12, 2)
    assert (squad.learning_rate, squad.warmup, squad.head) == (3e-5, 0.1, "trained")
    smoke = protocols.smoke()
    assert (smoke.train_rows, smoke.validation_rows, smoke.test_rows) == (192, 64, 128)
    assert (smoke.epochs, smoke.head_epochs, smoke.batch_size, smoke.max_length) == (2, 10, 16, 64)


def test_presets_take_changes() -> None:
    assert protocols.hadamard(epochs=1, head="trained").epochs == 1
    assert protocols.unipelt(100, patience=3).patience == 3
    with pytest.raises(ArgumentError, match=r"field of Protocol='learning' is not allowed.*'learning_rate'"):
        protocols.smoke(learning=1)


# what a field does in training ------------------------------------------------------------------------------------

TWO = Protocol(
    head="first-then-frozen",
    learning_rate=3e-3,
    epochs=2,
    head_learning_rate=7e-3,
    head_epochs=3,
    batch_size=16,
    eval_batch_size=7,
    max_length=9,
    weight_decay=0.2,
    warmup=0.0,
    schedule="constant",
    betas=(0.8, 0.95),
    epsilon=1e-5,
)


def trained(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any], list[Any]]:
    """The outcome, the optimizer of each stage, and every call of the model as (training, inputs)."""
    optimizers: list[Any] = []
    calls: list[Any] = []
    make = stages.make_optimizer

    def noted(*args: Any) -> Any:
        optimizers.append(make(*args))
        return optimizers[-1]

    monkeypatch.setattr(stages, "make_optimizer", noted)
    attachment = ht.attach(tiny_bert(), ht.Pfeiffer(bottleneck=4))
    attachment.model.register_forward_pre_hook(
        lambda module, args, inputs: calls.append((module.training, inputs)), with_kwargs=True
    )
    return train(attachment, tiny_task(train=80, test=20), tiny_tokenizer(), protocol), optimizers, calls


def test_the_numbers_of_a_protocol_reach_the_optimizer_of_their_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome, optimizers, _ = trained(TWO, monkeypatch)
    assert [row["stage"] for row in outcome.history] == [1, 1, 1, 2, 2]
    for optimizer, rate in zip(optimizers, (7e-3, 3e-3), strict=True):
        assert {group["lr"] for group in optimizer.param_groups} == {rate}, "constant to the end"
        assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
        assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_batches_are_as_large_and_rows_as_long_as_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, calls = trained(replace(TWO, stage_one="full"), monkeypatch)
    for training, size in ((True, 16), (False, 7)):
        inputs = [batch["input_ids"].shape for mode, batch in calls if mode is training]
        assert max(rows for rows, _ in inputs) == size
        assert max(length for _, length in inputs) == 9


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1)])
def test_warm_up_rounds_up_and_the_schedule_follows(schedule: str, last: float) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    scheduler = stages.make_scheduler(optimizer, 13, Protocol(warmup=0.2, schedule=schedule))
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])  # three steps of 13 x 0.2 = 2.6
    assert rates[-1] == pytest.approx(last)


def test_the_loss_of_an_epoch_is_the_mean_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    backward = Accelerator.backward

    def noted(self: Accelerator, loss: torch.Tensor, **options: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, **options)

    monkeypatch.setattr(Accelerator, "backward", noted)
    outcome, _, _ = trained(replace(TWO, head="trained", epochs=3), monkeypatch)
    steps = len(losses) // 3
    for epoch, row in enumerate(outcome.history):
        assert row["loss"] == pytest.approx(sum(losses[epoch * steps : (epoch + 1) * steps]) / steps)


def test_the_last_epoch_is_kept_though_an_earlier_one_was_better(monkeypatch: pytest.MonkeyPatch) -> None:
    standing = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(
        Labelled, "score", lambda *_: {"accuracy": next(standing, 0.1), "f1": 0.0, "loss": 1.0}
    )
    outcome, _, _ = trained(replace(TWO, head="trained", epochs=3, select="last"), monkeypatch)
    assert outcome.details["selected"] == {"stage_two": 3}
