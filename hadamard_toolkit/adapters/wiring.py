"""The parts of an adapter in a model: their modules as one submodule, and their hooks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.adapters.gates import listen
from hadamard_toolkit.adapters.passing import refuse_replicas
from hadamard_toolkit.sites import Sites

# The submodule of a model that holds the modules of its adapter.
HOME = "hadamard_attachment"


class Wiring:
    """The `insertions`, by label, at work in the model of `sites` until `remove`."""

    def __init__(self, sites: Sites, insertions: Mapping[str, Insertion]) -> None:
        self._sites, self._insertions = sites, insertions
        self._handles: list[Any] = []
        home = nn.Module()
        for label, insertion in insertions.items():
            _nest(home, label, insertion.module)
        home.train(sites.model.training)
        sites.model.add_module(HOME, home)
        self.connect()

    def connect(self, off: Collection[str] = ()) -> None:
        """Put all insertions to work except those with the labels `off`, whatever was at work before."""
        for handle in self._handles:
            handle.remove()
        active = [insertion for label, insertion in self._insertions.items() if label not in off]
        self._handles = [handle for insertion in active for handle in insertion.connect()]
        self._handles += listen(self._sites, active)
        if active:
            self._handles.append(self._sites.base.register_forward_pre_hook(refuse_replicas, prepend=True))

    def remove(self) -> None:
        """Take hooks and modules out of the model."""
        self.connect(off=self._insertions)
        delattr(self._sites.model, HOME)


def _nest(home: nn.Module, label: str, module: nn.Module) -> None:
    *parents, name = label.split(".")
    for parent in parents:
        if not hasattr(home, parent):
            home.add_module(parent, nn.Module())
        home = home.get_submodule(parent)
    home.add_module(name, module)
