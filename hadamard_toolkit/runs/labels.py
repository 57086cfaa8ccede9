"""How runs and adapters are called in tables: as one would write them in code."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadamard_toolkit.runs.spec import RunSpec


def method_name(adapter: Any) -> str:
    """Class name of an adapter; a stack's parts joined by "+"."""
    parts = [getattr(adapter, f.name) for f in dataclasses.fields(adapter)]
    nested = [
        part
        for part in parts
        if isinstance(part, tuple) and part and all(map(dataclasses.is_dataclass, part))
    ]
    return "+".join(method_name(part) for part in nested[0]) if nested else type(adapter).__name__


def describe(spec: RunSpec) -> str:
    """The method of a run in one line: its adapter as code, how it is pruned and on what it was pretrained, if so."""
    parts = [label_of(spec.adapter)]
    if spec.sparsity is not None:
        parts.append(label_of(spec.sparsity))
    if spec.protocol.pretraining:
        parts.append(f"after {', '.join(label_of(step) for step in spec.protocol.pretraining)}")
    return " ".join(parts)


def label_of(value: Any, usual: Any = None) -> str:
    """A dataclass as one would write it in code, with the fields that differ from their defaults, or from `usual`."""
    changed = []
    for entry in dataclasses.fields(value):
        own = getattr(value, entry.name)
        default = (
            entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        )
        if own != (default if usual is None else getattr(usual, entry.name)):
            changed.append(f"{entry.name}={_source(own)}")
    return f"{type(value).__name__}({', '.join(changed)})"


def _source(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return label_of(value)
    if isinstance(value, tuple):
        inner = ", ".join(map(_source, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return json.dumps(value) if isinstance(value, str) else repr(value)
