"""Models whose layers share weights (ALBERT): a module of its own for every depth step, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hadamard_toolkit.errors import UnsupportedError


def unshare(model: PreTrainedModel) -> Unshared | None:
    """Give every depth step of a layer-sharing model (ALBERT) its own modules over the *same* parameters.

    Adapters can then attach to each step, and no forward pass has to count steps. Returns the object that undoes it, or
    None where layers are not shared.
    """
    config = model.config
    if config.model_type != "albert":
        return None
    if config.inner_group_num != 1:
        raise UnsupportedError(
            f"albert with inner_group_num={config.inner_group_num} is not supported; only 1 is"
        )
    return None if config.num_hidden_groups == config.num_hidden_layers else Unshared(model)


class Unshared:
    """The depth steps of an ALBERT, each with its own modules; an object without closures, so that it can be copied.

    The first step of a group is the group itself, so that hooks of others on it survive. The config of the model stays
    as it is (only the encoder sees another), and so does its state dict.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        config: Any = model.config
        self.config, self.encoder = config, base.encoder
        self.shared, self.groups = self.encoder.albert_layer_groups, config.num_hidden_groups
        sources = [
            int(step / (config.num_hidden_layers / self.groups)) for step in range(config.num_hidden_layers)
        ]
        steps = []
        for step, source in enumerate(sources):
            group = self.shared[source]
            same: dict[int, Any] = {id(t): t for t in chain(group.parameters(), group.buffers())}
            first = source not in sources[:step]
            steps.append(group if first else copy.deepcopy(group, {**same, id(config): config}))
        self.encoder.albert_layer_groups = _Steps(steps, sources)
        self.encoder.config = _OneGroupEach(config)

    def untie(self) -> None:
        """Give every step its own copy of the parameters; the model, with its config, is then one without sharing."""
        steps: _Steps = self.encoder.albert_layer_groups
        for step, source in enumerate(steps.sources):
            if source in steps.sources[:step]:
                for module in steps[step].modules():
                    for name, parameter in list(module.named_parameters(recurse=False)):
                        own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                        setattr(module, name, own)
        self.encoder.albert_layer_groups = nn.ModuleList(steps)
        self.encoder.config = self.config
        self.config.num_hidden_groups = self.config.num_hidden_layers

    def undo(self) -> None:
        """Give the model its shared groups back."""
        self.shared.training = self.encoder.training
        self.encoder.albert_layer_groups = self.shared
        self.encoder.config = self.config
        self.config.num_hidden_groups = self.groups


class _Steps(nn.ModuleList):
    """Depth steps, and the group that each of them runs; a state dict has each group once."""

    def __init__(self, steps: list[nn.Module], sources: list[int]) -> None:
        super().__init__(steps)
        self.sources = sources

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        for group in sorted(set(self.sources)):
            self[self.sources.index(group)].state_dict(
                destination=destination, prefix=f"{prefix}{group}.", keep_vars=keep_vars
            )
        return destination

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        entries = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        groups = tuple(f"{prefix}{group}." for group in set(self.sources))
        unexpected = args[3] if len(args) > 3 else options["unexpected_keys"]
        unexpected += [name for name in entries if not name.startswith(groups)]
        for step, group in enumerate(self.sources):
            before = f"{prefix}{group}."
            for name, value in entries.items():
                if name.startswith(before):
                    state_dict[f"{prefix}{step}.{name.removeprefix(before)}"] = value


class _OneGroupEach:
    """A view of the config of an ALBERT in which every step counts as a group; its encoder sees this."""

    def __init__(self, original: Any) -> None:
        self._original = original

    @property
    def num_hidden_groups(self) -> int:
        return int(self._original.num_hidden_layers)

    def __getattr__(self, name: str) -> Any:
        # A copy asks for attributes before it has an original.
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(self._original, name)
