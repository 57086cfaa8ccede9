"""Steps of continued pretraining as values: checks, keys and their place in a protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.training import protocols
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.protocols import dapt, tapt


def spec(**changes: Any) -> RunSpec:
    return RunSpec("minilm-l6", "sst2", ht.Hadamard(), Protocol(**changes))


def test_keys_change_with_pretraining_and_stay_without() -> None:
    assert "pretraining" not in spec().to_json()
    assert "stride" not in spec().to_json()
    assert spec(pretraining=()).key == spec(stride=None).key == spec().key
    different = [
        (tapt(),),
        (tapt(epochs=4),),
        (dapt("reviews"),),
        (dapt("reviews"), tapt()),
        (tapt(), dapt("reviews")),
    ]
    assert len({spec().key, *(spec(pretraining=steps).key for steps in different)}) == 6
    assert spec(pretraining=tapt(learning_rate=1)).key == spec(pretraining=(tapt(learning_rate=1.0),)).key
    assert len({spec(stride=stride).key for stride in (None, 0, 32)}) == 3


def test_protocols_with_steps_are_values() -> None:
    protocol = protocols.hadamard(pretraining=[dapt("news", rows=10), tapt()])
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert hash(Protocol.from_dict(protocol.to_dict())) == hash(protocol)
    assert RunSpec.from_dict(spec(pretraining=(tapt(),)).to_dict()) == spec(pretraining=(tapt(),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Protocol(pretraining="tapt"), "pretraining='tapt' is not allowed"),
        (lambda: Protocol(pretraining=("tapt",)), "pretraining has the step 'tapt'"),
        (lambda: Protocol(pretraining=({"texts": "task"},)), "field of ContinuedPretraining='texts'"),
        (lambda: tapt(mask_share=1.0), "mask_share=1.0 is not allowed"),
        (lambda: tapt(epochs=0), "epochs=0 is not allowed"),
        (lambda: tapt(epochs=1.5), "epochs=1.5 is not allowed; it must be a whole number"),
        (lambda: tapt(rows=1), "rows=1 is not allowed"),
        (lambda: tapt(learning_rate="fast"), "learning_rate='fast' is not allowed"),
        (lambda: tapt(precision="fp16"), "precision='fp16' is not allowed"),
        (lambda: dapt(""), "text='' is not allowed"),
    ],
)
def test_bad_steps_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
