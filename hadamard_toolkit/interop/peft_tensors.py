"""What the formats of stock `peft` share: tensors by the path of the module that `peft` wraps, and their sites here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hadamard_toolkit.adapters.fields import Layers
from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.sites import Site, Sites

Tensors = dict[str, Tensor]


def grouped(sites: Sites, layers: Layers, targets: tuple[str, ...]) -> dict[str, list[Site]]:
    """The sites of `targets`, by the path of their module: several where a projection is fused."""
    by_path: dict[str, list[Site]] = {}
    for layer in sites.layers(layers):
        for target in targets:
            site = sites(layer, target)
            by_path.setdefault(site.path, []).append(site)
    return by_path


def targets_of(
    changed: dict[Site, Any], names: tuple[str, ...], sites: Sites
) -> tuple[tuple[str, ...], Layers]:
    """The fields `targets` and `layers` of an adapter at the sites `changed`, which must be the same in every layer."""
    by_layer: dict[int, set[str]] = {}
    for site in changed:
        assert site.layer is not None
        by_layer.setdefault(site.layer, set()).add(site.name)
    if not by_layer:
        raise DataError("the file holds no tensor of a layer")
    targets = next(iter(by_layer.values()))
    if any(other != targets for other in by_layer.values()):
        listed = ", ".join(f"{layer}: {sorted(names)}" for layer, names in by_layer.items())
        raise UnsupportedError(
            f"the layers of the file have different targets ({listed}); an adapter has one set"
        )
    layers = tuple(sorted(by_layer))
    return tuple(name for name in names if name in targets), "all" if len(layers) == len(sites) else layers


def take(tensors: Tensors, name: str) -> Tensor:
    """Remove the tensor `name` from `tensors` and return it; `DataError` where it is missing."""
    if name not in tensors:
        raise DataError(f"tensor {name!r} is missing from the file")
    return tensors.pop(name)


def paths_of(tensors: Tensors, ending: str, known: dict[str, list[Site]]) -> list[str]:
    """Paths of all tensors with this ending; each must be a module that the toolkit has sites for."""
    paths = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    for path in paths:
        if path not in known:
            raise UnsupportedError(
                f"the file changes {path!r}, which is no projection that the toolkit adapts"
            )
    return paths


def without_idle_slices(changed: dict[Site, Any], idle: Callable[[Any], bool]) -> dict[Site, Any]:
    """Leave out slices of fused projections that nothing changes in any layer, unless nothing is changed at all."""
    busy = {site.name for site, value in changed.items() if not site.projection_slice or not idle(value)}
    return {site: value for site, value in changed.items() if site.name in busy} or changed
