"""Fields of adapters: each is declared with its default and with what is allowed in it.

`rank: int = whole(8)` in the body of an adapter is the field `rank` with the default 8, and `Adapter.__post_init__`
refuses anything but a whole number of at least 1. A check may also normalise: `layers=[2, 0]` becomes `(0, 2)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from hadamard_toolkit.errors import ArgumentError, check_choice, check_number, check_whole, suggestion
from hadamard_toolkit.sites import as_index

Layers = str | tuple[int, ...]
# Takes the name of a field and a value for it; gives the value to keep, or raises `ArgumentError`.
Check = Callable[[str, Any], Any]


def checked(check: Check, default: Any = dataclasses.MISSING) -> Any:
    """A field whose values pass through `check`; without a `default` it must be given."""
    return dataclasses.field(default=default, metadata={"check": check})


def check_fields(adapter: Any) -> None:
    """Check every declared field of the dataclass `adapter` and keep what its check makes of the value."""
    for field in dataclasses.fields(adapter):
        if check := field.metadata.get("check"):
            value = getattr(adapter, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(adapter, field.name, check(field.name, value))


def whole(default: int | None, *, optional: bool = False) -> Any:
    """A whole number of at least 1; None too if it is `optional`. Those of numpy and torch become plain ints."""

    def check(name: str, value: Any) -> Any:
        index = as_index(value)
        value = value if index is None else index
        check_whole(name, value, least=1, optional=optional)
        return value

    return checked(check, default)


def number(
    default: float, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A finite number within the bounds, which are those of `errors.check_number`."""

    def check(name: str, value: Any) -> Any:
        check_number(name, value, least=least, above=above, below=below)
        return value

    return checked(check, default)


def one_of(default: str | None, allowed: Collection[str | None]) -> Any:
    """One of the values `allowed`."""

    def check(name: str, value: Any) -> Any:
        check_choice(name, value, allowed)
        return value

    return checked(check, default)


def some_of(default: tuple[str, ...], allowed: tuple[str, ...], *, least: int = 1) -> Any:
    """A tuple with at least so many of the names `allowed`, kept in their order."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not hasattr(value, "__iter__") or len(chosen := tuple(value)) < least:
            raise ArgumentError(f"{name}={value!r} is not allowed; give a tuple, e.g. ({allowed[0]!r},)")
        for item in chosen:
            check_choice(name, item, allowed)
        return tuple(item for item in allowed if item in chosen)

    return checked(check, default)


def all_layers() -> Any:
    """The field `layers`: `"all"`, or indices of layers, kept as a sorted tuple."""
    return checked(lambda name, value: check_layers(value), "all")


def check_layers(layers: Any) -> Layers:
    """`layers` as `"all"` or a sorted tuple of indices; `ArgumentError` for anything else."""
    if isinstance(layers, str) and layers == "all":
        return "all"
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise ArgumentError(
            f"layers={layers!r} is not allowed; give 'all' or the indices of layers, e.g. (0, 3, 7)"
        )
    chosen = tuple(layers)
    indices = set[int]()
    for layer in chosen:
        index = as_index(layer)
        if index is None:
            raise ArgumentError(f"layers={chosen!r} is not allowed: {layer!r} is not the index of a layer")
        indices.add(index)
    return tuple(sorted(indices))


# What peft and AdapterHub call these fields: the name there -> the name here, and how the values differ.
ALIASES: dict[str, tuple[str, str]] = {
    "r": ("rank", ""),
    "lora_r": ("rank", ""),
    "lora_alpha": ("alpha", ""),
    "lora_dropout": ("dropout", ""),
    "target_modules": ("targets", "sites such as 'query' and 'value'"),
    "feedforward_modules": ("targets", "sites such as 'ffn_hidden'"),
    "num_virtual_tokens": ("length", ""),
    "prefix_length": ("length", ""),
    "prompt_length": ("length", ""),
    "encoder_hidden_size": ("bottleneck", ""),
    "prefix_projection": ("bottleneck", "a width, or None"),
    "bottleneck_size": ("bottleneck", ""),
    "reduction_factor": ("bottleneck", "the hidden size divided by the factor"),
    "non_linearity": ("activation", ""),
    "adapter_dropout": ("dropout", ""),
    "scaling": ("scale", ""),
    "layers_to_transform": ("layers", ""),
    "leave_out": ("layers", "those to keep"),
    "init_lora_weights": ("init", ""),
    "init_weights": ("init", ""),
    "use_gating": ("gated", "'original', 'masked' or None"),
}


def check_known(adapter: str, name: str, value: Any, known: Collection[str]) -> None:
    """Raise `ArgumentError` unless the field `name` is one of the fields `known` of `adapter`."""
    if name in known:
        return
    alias, difference = ALIASES.get(name, ("", ""))
    hint = suggestion(name, known)
    if alias in known:
        hint = f" Did you mean {alias!r}{f' ({difference})' if difference else ''}?"
    fields = f"its fields are {', '.join(known)}" if known else "it has no fields"
    raise ArgumentError(f"{adapter}({name}={value!r}) is not allowed; {fields}{hint and f'.{hint}'}")
