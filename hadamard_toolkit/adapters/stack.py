"""Several adapters on one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hadamard_toolkit.adapters.base import Adapter, Declared, register
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sites import Sites


@register
@dataclass(frozen=True, init=False)
class Stack(Adapter):
    """`Stack(a, b, …)`: all of them at once; at a site that both have, b acts on the output of a.

    A stack within a stack is flattened. Parameters at a shared site are distinguished by a suffix in their names
    (`layers.0.query`, `layers.0.query_2`). It merges if every part does.
    """

    adapters: tuple[Adapter, ...]

    def __init__(self, *parts: Adapter, adapters: tuple[Adapter, ...] = ()) -> None:
        flat: list[Adapter] = []
        for part in (*parts, *adapters):
            if not isinstance(part, Adapter):
                raise ArgumentError(f"Stack(… {part!r} …) is not allowed; give adapters such as LoRA()")
            flat += part.adapters if isinstance(part, Stack) else [part]
        if not flat:
            raise ArgumentError(
                "Stack() is not allowed; give at least one adapter (HeadOnly() is the empty one)"
            )
        object.__setattr__(self, "adapters", tuple(flat))

    def declare(self, sites: Sites) -> Iterator[Declared]:
        for adapter in self.adapters:
            yield from adapter.declare(sites)
