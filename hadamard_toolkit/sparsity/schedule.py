"""Pruning during training: magnitude, on a cubic schedule (Zhu and Gupta 2017)."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.base import adapter_to_dict
from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.sparsity.allocate import narrowed, pools
from hadamard_toolkit.sparsity.guards import check_finite
from hadamard_toolkit.sparsity.maskable import targets
from hadamard_toolkit.sparsity.masks import Masks
from hadamard_toolkit.sparsity.spec import SCOPES, Maskable, check_schedule, check_sparsity


class GradualPruning:
    """Masks that narrow during training: `train(…, on_step=GradualPruning(…))` calls this after every optimizer step.

    The sparsity after step t is s(t) = s·(1 - (1 - p)³), where p rises from 0 to 1 between `begin` and `end` (shares of
    all steps); masks narrow every `every` steps and at the end, exact to one entry (Zhu and Gupta 2017, equation 1,
    from 0). The lowest |θ| within `scope` go. Removed entries stay removed, and their momentum in the optimizer is
    cleared.

    `masks` are applied from the start, with all entries kept; afterwards `Masks.of(attachment)` gives the final ones.
    The call returns True until the masks are final; weights from before must not be selected.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        sparsity: float,
        scope: str = "global",
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 10,
        maskable: Maskable = "projections",
    ) -> None:
        check_sparsity(sparsity)
        check_choice("scope", scope, SCOPES)
        check_schedule(begin, end, every)
        if attachment.masking:
            raise ArgumentError("this attachment has masks already; remove() them first")
        chosen = targets(attachment, maskable)
        self.attachment, self.sparsity, self.scope = attachment, sparsity, scope
        self.begin, self.end, self.every = begin, end, every
        self.parameters = {name: target.parameter for name, target in chosen.items()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.sites = {name: target.site for name, target in chosen.items()}
        self._final = pools("magnitude", sparsity, scope, self.shapes, self.sites)
        provenance = {
            "scorer": "magnitude",
            "when": "gradual",
            "sparsity": sparsity,
            "scope": scope,
            "rounds": 1,
            "begin": begin,
            "end": end,
            "every": every,
            "maskable": maskable if isinstance(maskable, str) else list(maskable),
            "init_seed": attachment.seed,
            "adapter": adapter_to_dict(attachment.adapter),
        }
        kept = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        self.masks = Masks(kept, self.sites, provenance).apply(attachment)

    def target(self, step: int, steps: int) -> float:
        """s(t) after step `step` of `steps`."""
        first, last = self._way(steps)
        way = min(max((step - first) / (last - first), 0.0), 1.0)
        return self.sparsity * (1 - (1 - way) ** 3)

    def __call__(self, step: int, steps: int, optimizer: Optimizer) -> bool:
        """After step `step` (from 1) of `steps`: narrow the masks if it is time. True while sparsity has to grow."""
        first, last = self._way(steps)
        if step == last or (first < step < last and (step - first) % self.every == 0):
            self._narrow(self.target(step, steps))
            self._clear(optimizer)
        return step < last

    def _way(self, steps: int) -> tuple[int, int]:
        last = max(1, round(self.end * steps))
        return min(round(self.begin * steps), last - 1), last

    def _narrow(self, share: float) -> None:
        masking = self.attachment.masking
        if masking is None:
            raise ArgumentError("the masks of this schedule were removed while it ran")
        scores = {name: parameter.detach().abs().cpu() for name, parameter in self.parameters.items()}
        check_finite("magnitude", scores)
        goal = pools("magnitude", share, self.scope, self.shapes, self.sites)
        masking.narrow(narrowed(scores, masking.kept, self._final, goal)[0])

    @torch.no_grad()
    def _clear(self, optimizer: Optimizer) -> None:
        kept = self.attachment.masking.kept if self.attachment.masking else {}
        for name, parameter in self.parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~kept[name].to(value.device), 0.0)
