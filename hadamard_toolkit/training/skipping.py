"""Running a model without some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode inside the block, and every module back in its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of `module` inside the block; its hooks stay."""
    held = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if held is not None:
            module.forward = held


class Forms(dict[int, int]):
    """The length of the tuple that a layer returns, by its index; a layer that returns a tensor is absent."""

    def note(self, index: int) -> Callable[..., None]:
        """A forward hook of layer `index` that learns its form."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self[index] = len(output)

        return hook

    def output(self, index: int, hidden: Tensor) -> Any:
        """`hidden` as layer `index` would return it."""
        return hidden if index not in self else (hidden, *[None] * (self[index] - 1))
