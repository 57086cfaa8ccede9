"""Fields of adapters: checked by one declaration, by the names that they have here, whole numbers of any library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import REGISTRY, Adapter, adapter_from_dict, adapter_to_dict
from hadamard_toolkit.adapters.fields import check_layers
from hadamard_toolkit.errors import ArgumentError
from tests.adapters.support import defaults
from tests.architectures import tiny_model

FIELDS = [
    (adapter, field.name)
    for adapter in defaults().values()
    for field in dataclasses.fields(adapter)
    if field.name != "adapters"
]
OPTIONAL = {("PrefixTuning", "bottleneck"), ("MAM", "prefix_bottleneck"), ("UniPELT", "prefix_bottleneck")}


def of_field(*names: str) -> Any:
    """Every adapter that has one of these fields, with that field."""
    chosen = [(adapter, name) for adapter, name in FIELDS if name in names]
    return pytest.mark.parametrize(
        ("adapter", "name"), chosen, ids=[f"{type(adapter).__name__}-{name}" for adapter, name in chosen]
    )


@of_field(*{name for _, name in FIELDS})
@pytest.mark.parametrize("value", [1j, "colour", ("colour",), True])
def test_no_field_takes_nonsense(adapter: Adapter, name: str, value: object) -> None:
    if name == "tasks" and value == ("colour",):
        return
    with pytest.raises(ArgumentError, match=rf"^{name}='?\(?[\w(',)]+'?\)? is not allowed"):
        dataclasses.replace(adapter, **{name: value})


@of_field("bottleneck", "rank", "length", "prefix_bottleneck")
def test_sizes_are_whole_numbers_of_at_least_one(adapter: Adapter, name: str) -> None:
    for good in (1, np.int64(1), torch.tensor(1)):
        made = getattr(dataclasses.replace(adapter, **{name: good}), name)
        assert (made, type(made)) == (1, int)
    for bad in (0, -1, 2.0, "2"):
        with pytest.raises(ArgumentError, match=rf"^{name}={bad!r} is not allowed; it must be .*>= 1"):
            dataclasses.replace(adapter, **{name: bad})
    if (type(adapter).__name__, name) in OPTIONAL:
        assert getattr(dataclasses.replace(adapter, **{name: None}), name) is None
    else:
        with pytest.raises(ArgumentError, match=rf"^{name}=None is not allowed; it must be a whole number"):
            dataclasses.replace(adapter, **{name: None})


@of_field("dropout")
def test_dropout_is_a_share_below_one(adapter: Adapter, name: str) -> None:
    for good in (0, 0.99, np.float32(0.5)):
        made = dataclasses.replace(adapter, **{name: good})
        assert json.loads(json.dumps(adapter_to_dict(made)))[name] == good
    for bad in (-0.01, 1, float("nan")):
        with pytest.raises(ArgumentError, match=rf"^{name}={bad!r} is not allowed; it must be"):
            dataclasses.replace(adapter, **{name: bad})


@of_field("alpha", "scale")
def test_factors_are_above_zero(adapter: Adapter, name: str) -> None:
    assert getattr(dataclasses.replace(adapter, **{name: 0.01}), name) == 0.01
    for bad in (0, -1.0, float("inf")):
        with pytest.raises(ArgumentError, match=rf"^{name}={bad!r} is not allowed; it must be"):
            dataclasses.replace(adapter, **{name: bad})


@of_field("targets", "vectors")
def test_names_are_kept_in_their_own_order_and_once(adapter: Adapter, name: str) -> None:
    chosen = getattr(adapter, name)
    assert len(chosen) > 1
    assert getattr(dataclasses.replace(adapter, **{name: [*chosen[::-1], *chosen]}), name) == chosen
    with pytest.raises(ArgumentError, match=rf"^{name}='{chosen[0]}' is not allowed; give a tuple, e.g. \('"):
        dataclasses.replace(adapter, **{name: chosen[0]})
    with pytest.raises(ArgumentError, match=rf"^{name}=3 is not allowed; give a tuple"):
        dataclasses.replace(adapter, **{name: 3})


@pytest.mark.parametrize("adapter", [ht.LoRA, ht.IA3])
def test_some_target_is_needed(adapter: Callable[..., Adapter]) -> None:
    with pytest.raises(ArgumentError, match=r"^targets=\(\) is not allowed; give a tuple"):
        adapter(targets=())


@of_field("layers")
def test_layers_are_all_or_sorted_indices(adapter: Adapter, name: str) -> None:
    for layers in (np.arange(2), torch.arange(2), range(2), [np.int8(1), 0, 1], (i for i in (1, 0))):
        assert dataclasses.replace(adapter, layers=layers).layers == (0, 1)  # type: ignore[attr-defined]
    for bad, message in (("first", "give 'all' or the indices"), (1, "give 'all' or the indices")):
        with pytest.raises(ArgumentError, match=rf"^layers={bad!r} is not allowed; {message}"):
            dataclasses.replace(adapter, layers=bad)
    for wrong in (np.array([0.5]), [True], [np.bool_(True)], ["0"]):
        with pytest.raises(ArgumentError, match="is not the index of a layer"):
            dataclasses.replace(adapter, layers=wrong)


def test_whole_numbers_of_other_libraries() -> None:
    assert all(type(layer) is int for layer in check_layers(np.arange(2)))
    attachment = ht.attach(tiny_model("bert"), ht.Hadamard(layers=np.arange(2)))  # type: ignore[arg-type]
    assert len(attachment.parameters("adapter")) == 4
    assert attachment.sites.layers(np.arange(-1, 1)) == [0, 2]
    counted = ht.LoRA(rank=np.int64(4), alpha=np.float64(2))  # type: ignore[arg-type]
    assert counted == ht.LoRA(rank=4, alpha=2.0)
    assert hash(counted) == hash(ht.LoRA(rank=4, alpha=2.0))
    assert json.dumps(adapter_to_dict(counted)) == json.dumps(adapter_to_dict(ht.LoRA(rank=4, alpha=2.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ht.LoRA(r=4),
            r"LoRA\(r=4\) is not allowed; its fields are rank, alpha, .*layers\. Did you mean 'rank'\?",
        ),
        (lambda: ht.LoRA(lora_alpha=4), r"Did you mean 'alpha'\?"),
        (lambda: ht.LoRA(lora_dropout=0.1), r"Did you mean 'dropout'\?"),
        (
            lambda: ht.LoRA(target_modules=["q"]),
            r"Did you mean 'targets' \(sites such as 'query' and 'value'\)\?",
        ),
        (lambda: ht.LoRA(ranks=4), r"Did you mean 'rank'\?"),
        (lambda: ht.IA3(target_modules=["k"]), r"Did you mean 'targets' "),
        (lambda: ht.PromptTuning(num_virtual_tokens=4), r"Did you mean 'length'\?"),
        (lambda: ht.PrefixTuning(num_virtual_tokens=4), r"Did you mean 'length'\?"),
        (lambda: ht.Pfeiffer(reduction_factor=16), r"Did you mean 'bottleneck' \(the hidden size divided by"),
        (lambda: ht.Houlsby(bottleneck_size=16), r"Did you mean 'bottleneck'\?"),
        (
            lambda: ht.Hadamard(r=4),
            r"Hadamard\(r=4\) is not allowed; its fields are layers, placement, norm, vectors$",
        ),
        (lambda: ht.HeadOnly(r=4), r"HeadOnly\(r=4\) is not allowed; it has no fields$"),
        (lambda: adapter_from_dict({"adapter": "LoRA", "r": 4}), r"LoRA\(r=4\).*Did you mean 'rank'\?"),
        (lambda: adapter_from_dict({"adapter": "lora"}), r"adapter='lora' is not.*Did you mean 'LoRA'\?"),
    ],
)
def test_an_unknown_field_is_named_by_ours(make: Callable[[], Adapter], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("adapter", sorted(REGISTRY))
def test_every_adapter_names_its_fields(adapter: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"{adapter}\(colour='red'\) is not allowed; (its fields|it has no)"
    ):
        REGISTRY[adapter](colour="red")  # type: ignore[call-arg]
