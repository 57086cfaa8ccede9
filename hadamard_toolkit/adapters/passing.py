"""What the hooks of one forward pass hand to one another, and what they read of a call."""

from __future__ import annotations

import inspect
import threading
from collections import UserDict
from typing import Any

from torch import nn
from transformers import Cache

from hadamard_toolkit.errors import UnsupportedError


class Passing(threading.local, UserDict[str, Any]):
    """Values by name that one hook leaves for a later one of the same forward pass.

    Every thread has its own, so that two threads may run one model at the same time. A copy starts empty.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Passing:
        return Passing()

    def __reduce__(self) -> tuple[type[Passing], tuple[()]]:
        return Passing, ()


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def refuse_cache(arguments: dict[str, Any], what: str) -> None:
    """Raise `UnsupportedError` where an argument is a filled cache of keys and values, whatever its name."""
    if any(isinstance(value, Cache) and value.get_seq_length() > 0 for value in arguments.values()):
        raise UnsupportedError(f"{what} needs the whole sequence in one pass; generate with use_cache=False")


def refuse_replicas(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of the base model: a replica would run the adapter of the original on its device."""
    if getattr(module, "_is_replica", False):
        raise UnsupportedError(
            "nn.DataParallel cannot replicate a model with an adapter; use DistributedDataParallel, or one device"
        )
