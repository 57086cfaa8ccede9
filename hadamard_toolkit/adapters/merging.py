"""Fold an adapter into the weights of its backbone, and take it out again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites, linear_weight


class Merge:
    """Folds `insertions` into the backbone of `sites` with `fold`, and restores it with `undo`.

    Raises `UnsupportedError` when it is made, before anything is changed.
    """

    def __init__(
        self, sites: Sites, insertions: Iterable[Insertion], *, allow_new_biases: bool = False
    ) -> None:
        self.sites, self.insertions = sites, list(insertions)
        for insertion in self.insertions:
            insertion.module.check_fold(insertion.site)
        shifted = [i.site for i in self.insertions if i.module.shifts and i.site.module.bias is None]
        self.switches = {switch for site in shifted if (switch := sites.bias_switch(site))}
        homeless = [site for site in shifted if not sites.bias_switch(site)]
        if homeless and not allow_new_biases:
            raise UnsupportedError(
                f"{homeless[0].path} of {type(sites.model).__name__} has no bias in its architecture, and the adapter "
                f"shifts its output: a merged model would lose the shift when it is saved and loaded. Train without a "
                "shift where the adapter can, or call merge(allow_new_biases=True) for a model that is used as it is"
            )
        self._before: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._switched: dict[str, bool] = {}

    @torch.no_grad()
    def fold(self) -> None:
        """Change the weights, after noting the values that `undo` restores."""
        config = self.sites.model.config
        for switch in self.switches:
            self._switched[switch] = getattr(config, switch)
            setattr(config, switch, True)
            for module in self.sites.switched_biases(switch):
                self._keep(module)
                _give_bias(module)
        for insertion in _from_within(self.insertions):
            self._keep(insertion.site.module)
            if insertion.module.shifts:
                _give_bias(insertion.site.module)
            insertion.module.fold(insertion.site)

    def _keep(self, host: nn.Module) -> None:
        if host not in self._before:
            bias: Tensor | None = host.bias  # type: ignore[assignment]
            self._before[host] = (
                host.weight.detach().clone(),  # type: ignore[operator]
                None if bias is None else bias.detach().clone(),
            )

    @torch.no_grad()
    def undo(self) -> None:
        """Restore weights, biases and config."""
        for host, (weight, bias) in self._before.items():
            host.weight.copy_(weight)  # type: ignore[operator]
            if bias is None:
                host.bias = None  # type: ignore[assignment]
            else:
                host.bias.copy_(bias)  # type: ignore[operator]
        for switch, value in self._switched.items():
            setattr(self.sites.model.config, switch, value)


def _give_bias(host: nn.Module) -> None:
    """Give a projection without a bias one of zeros."""
    if host.bias is None:
        zeros = torch.zeros_like(linear_weight(host)[:, 0])
        host.bias = nn.Parameter(zeros, requires_grad=False)


def _from_within(insertions: list[Insertion]) -> list[Insertion]:
    """The order of folding: those behind a projection as they were wired, then those before it in reverse."""
    before = [insertion for insertion in insertions if insertion.site.side == "input"]
    return [insertion for insertion in insertions if insertion not in before] + before[::-1]
