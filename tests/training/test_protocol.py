from __future__ import annotations

import json
from typing import Any

import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.training import protocols
from hadamard_toolkit.training.protocol import Protocol

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


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ArgumentError, match="field of Protocol='lr'"):
        Protocol.from_dict({"lr": 1e-3})


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
    assert protocols.hadamard().head == "first-then-frozen"


def test_presets_take_changes() -> None:
    assert protocols.hadamard(epochs=1, head="trained").epochs == 1
    assert protocols.unipelt(100, patience=3).patience == 3
    with pytest.raises(TypeError, match="learning"):
        protocols.smoke(learning=1)
