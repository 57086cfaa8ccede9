"""Declarations: fields by the names that they have here, whole numbers of any kind."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import REGISTRY, Adapter, adapter_to_dict, check_layers
from hadamard_toolkit.errors import ArgumentError
from tests.adapters.support import NEED_FIELDS
from tests.architectures import tiny_model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ht.LoRA(r=4),
            r"LoRA\(r=4\) is not allowed; did you mean rank\? its fields are rank, alpha, targets",
        ),
        (lambda: ht.LoRA(lora_alpha=4), r"did you mean alpha\?"),
        (lambda: ht.LoRA(lora_dropout=0.1), r"did you mean dropout\?"),
        (
            lambda: ht.LoRA(target_modules=["q"]),
            r"did you mean targets \(sites such as 'query' and 'value'\)\?",
        ),
        (lambda: ht.LoRA(ranks=4), r"did you mean rank\?"),
        (lambda: ht.IA3(target_modules=["k"]), r"did you mean targets "),
        (lambda: ht.PromptTuning(num_virtual_tokens=4), r"did you mean length\?"),
        (lambda: ht.PrefixTuning(num_virtual_tokens=4), r"did you mean length\?"),
        (lambda: ht.Pfeiffer(reduction_factor=16), r"did you mean bottleneck \(the hidden size divided by"),
        (lambda: ht.Houlsby(bottleneck_size=16), r"did you mean bottleneck\?"),
        (
            lambda: ht.Hadamard(r=4),
            r"Hadamard\(r=4\) is not allowed; its fields are layers, placement, norm, vectors",
        ),
        (lambda: ht.HeadOnly(r=4), r"HeadOnly\(r=4\) is not allowed; it has no fields"),
    ],
)
def test_a_field_of_another_library_is_named_by_ours(make: Callable[[], Adapter], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("adapter", sorted(REGISTRY))
def test_every_adapter_names_its_fields(adapter: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"{adapter}\(colour='red'\) is not allowed; (its fields|it has no)"
    ):
        REGISTRY[adapter](colour="red")  # type: ignore[call-arg]


@pytest.mark.parametrize("adapter", sorted(REGISTRY))
def test_declarations_can_be_copied(adapter: str) -> None:
    made = NEED_FIELDS.get(adapter) or REGISTRY[adapter]()
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_whole_numbers_of_other_libraries() -> None:
    for layers in (np.arange(2), torch.arange(2), range(2), [np.int8(1), 0], (i for i in (1, 0))):
        assert ht.Hadamard(layers=layers) == ht.Hadamard(layers=(0, 1))  # type: ignore[arg-type]
        assert all(type(layer) is int for layer in check_layers(np.arange(2)))
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard(layers=np.arange(2)))  # type: ignore[arg-type]
    assert len(attachment.parameters("adapter")) == 4
    assert attachment.sites.layers(np.arange(-1, 1)) == [0, 2]
    counted = ht.LoRA(rank=np.int64(4))  # type: ignore[arg-type]
    assert counted == ht.LoRA(rank=4)
    assert hash(counted) == hash(ht.LoRA(rank=4))
    assert json.dumps(adapter_to_dict(counted)) == json.dumps(adapter_to_dict(ht.LoRA(rank=4)))
    for bad in (np.array([0.5]), [True], [np.bool_(True)], ["0"]):
        with pytest.raises(ArgumentError, match="is not the index of a layer"):
            ht.Hadamard(layers=bad)  # type: ignore[arg-type]
