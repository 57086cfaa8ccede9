"""The parts of an adapter on a model, built and named, before anything is wired."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from hadamard_toolkit.adapters.base import Adapter, Insertion, Tuning
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sites import Sites, position_limit


@dataclass
class Declaration:
    """Insertions and tuned parameters by their labels, and the tunings in order."""

    insertions: dict[str, Insertion] = field(default_factory=dict)
    tunings: list[Tuning] = field(default_factory=list)
    tuned: dict[str, nn.Parameter] = field(default_factory=dict)


def declare(adapter: Adapter, sites: Sites, seed: int) -> Declaration:
    """The parts of `adapter` on the model of `sites`, with the initial values of `seed`; the model is not changed."""
    declaration, roles = Declaration(), dict[int, str]()
    model = sites.model
    device = next(model.parameters()).device
    # Backbones in half precision train their adapters in float32.
    precision = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        # torch.manual_seed would also seed the generators of GPUs.
        torch.default_generator.manual_seed(seed)
        for declared in adapter.declare(sites):
            if isinstance(declared, Tuning):
                parameter = model.get_parameter(declared.path)
                # In a stack, the first part that names a parameter decides its role.
                role = roles.setdefault(id(parameter), declared.role)
                if declared.label not in declaration.tuned and declared.role == role:
                    declaration.tunings.append(declared)
                    declaration.tuned[declared.label] = parameter
                continue
            label, copies = declared.site.label, 1
            while label in declaration.insertions:
                copies += 1
                label = f"{declared.site.label}_{copies}"
            if device.type != "meta":
                declared.module.to(device, precision)
            declaration.insertions[label] = declared
    limit, added = position_limit(model), sum(part.module.added for part in declaration.insertions.values())
    if limit is not None and added >= limit:
        raise ArgumentError(
            f"{adapter} adds {added} positions to the input of this {type(model).__name__}, which has {limit}: no room "
            "is left for the input itself"
        )
    return declaration
