"""Training in a subspace: a few coefficients of fixed directions move all vectors of another adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule, Tuning, register
from hadamard_toolkit.adapters.bases import load_basis
from hadamard_toolkit.adapters.fields import checked, whole
from hadamard_toolkit.adapters.hadamard import Hadamard, HadamardVectors
from hadamard_toolkit.adapters.tuning import LayerNormTuning
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.sites import Site, Sites


class SpannedVectors(SiteModule):
    """Changes of vectors Δ = Σ_i c_i d_i; the coefficients c [k] are one parameter that all sites share.

    The directions, [k, width] per vector, are stored and never train.
    """

    def __init__(self, coefficients: nn.Parameter, directions: Mapping[str, Tensor]) -> None:
        # Not `super`: behind this class may stand that of the wrapped adapter, whose vectors are computed here.
        SiteModule.__init__(self)
        self.coefficients = coefficients
        for name, rows in directions.items():
            self.register_parameter(f"{name}_directions", nn.Parameter(rows, requires_grad=False))
        self.frozen = tuple(f"{name}_directions" for name in directions)

    def change(self, name: str) -> Tensor | None:
        """Δ of one vector [width], or None where it has no directions."""
        rows: Tensor | None = getattr(self, f"{name}_directions", None)
        # Not a matrix product, which autocast would round to half precision.
        return None if rows is None else (self.coefficients[:, None] * rows).sum(0)


class SpannedHadamard(SpannedVectors, HadamardVectors):
    """A' = W ⊙ A + b with W = 1 + Δ_W and b = Δ_b."""

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        change = self.change("weight")
        return None if change is None else 1 + change

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.change("bias")


class SpannedNorm(SpannedVectors):
    """A LayerNorm with γ + Δ_γ and β + Δ_β: it is linear in both, so the norm of its input with Δ_γ, Δ_β is added."""

    def __init__(
        self, coefficients: nn.Parameter, directions: Mapping[str, Tensor], norm: nn.LayerNorm
    ) -> None:
        super().__init__(coefficients, directions)
        self.eps = norm.eps

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        weight, bias = self.change("weight"), self.change("bias")
        assert weight is not None
        added = functional.layer_norm(inputs.to(weight.dtype), weight.shape, weight, bias, self.eps)
        return (hidden + added).to(hidden.dtype)

    def fold(self, site: Site) -> None:
        for name, parameter in site.module.named_parameters():
            change = self.change(name)
            assert change is not None
            parameter.copy_(parameter.double() + change.double())


def _check_wrapped(name: str, value: Any) -> Adapter:
    if not isinstance(value, Hadamard | LayerNormTuning):
        raise ArgumentError(
            f"{name}={value!r} is not allowed; give Hadamard(…) or LayerNormTuning(…), whose vectors have directions"
        )
    return value


def _check_basis(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ArgumentError(f"{name}={value!r} is not allowed; give what save_basis returned, 16 hex digits")
    return value


@register
@dataclass(frozen=True)
class Subspace(Adapter):
    """θ = θ_0 + Σ_i c_i d_i: of another adapter's parameters θ, only k coefficients train (Li et al. 2018).

    The directions d_i are fixed and span all layers and vectors together. Li et al. (2018) and Aghajanyan et al. (2021)
    draw them at random; here they come from a basis, which other tasks may have found (`studies.task_basis`).

    Parameters
    ----------
    wrapped: the adapter whose vectors move: a `Hadamard` or a `LayerNormTuning`.
    basis: the name of the basis, as `save_basis` returned it. It is the hash of the directions, so that a run's key
        depends on them and not on where they are kept.
    k: how many directions of the basis, the first ones.

    k parameters train in all, whatever the backbone; c = 0, the identity, at the start. The saved adapter holds its k
    directions and loads without the file of the basis. It merges as `wrapped` does. Norms can be wrapped where they
    are LayerNorms of single layers.
    """

    # Runs of one bank may differ in it.
    values_only: ClassVar[tuple[str, ...]] = ("basis",)

    wrapped: Adapter = checked(_check_wrapped)
    basis: str = checked(_check_basis)
    k: int = whole(8)

    def declare(self, sites: Sites) -> Iterator[Declared]:
        vectors = _vectors(self.wrapped, sites)
        directions = self._directions(vectors, sites)
        coefficients = nn.Parameter(torch.zeros(self.k))
        for site, widths in vectors:
            rows = {name: directions[f"{site.label}.{name}"] for name in widths}
            norm = site.module
            module = (
                SpannedNorm(coefficients, rows, norm)
                if isinstance(norm, nn.LayerNorm)
                else SpannedHadamard(coefficients, rows)
            )
            yield Insertion(site, module)

    def _directions(self, vectors: list[tuple[Site, dict[str, int]]], sites: Sites) -> Mapping[str, Tensor]:
        """The first k directions by the names of the vectors; zeros where their values do not matter yet."""
        needed = {f"{site.label}.{name}": width for site, widths in vectors for name, width in widths.items()}
        if _shapes_only.get() or next(sites.model.parameters()).is_meta:
            return {name: torch.zeros(self.k, width) for name, width in needed.items()}
        directions = load_basis(self.basis).directions
        there = {name: rows.shape[1] for name, rows in directions.items()}
        if there != needed:
            wrong = next(name for name in {**needed, **there} if there.get(name) != needed.get(name))
            raise ArgumentError(
                f"basis={self.basis!r} does not fit {self.wrapped} on this {type(sites.model).__name__}: {wrong} has "
                f"{there.get(wrong, 0)} coordinates in the basis and {needed.get(wrong, 0)} here; give one that "
                "was made from runs of this adapter and backbone"
            )
        if self.k > (most := len(next(iter(directions.values())))):
            raise ArgumentError(f"k={self.k} is not allowed: basis={self.basis!r} has {most} directions")
        return {name: rows[: self.k].clone() for name, rows in directions.items()}


def _vectors(wrapped: Adapter, sites: Sites) -> list[tuple[Site, dict[str, int]]]:
    """The sites whose vectors train, with the names and widths of these."""
    found: dict[str, tuple[Site, dict[str, int]]] = {}
    labels: dict[int, str] = {}
    for part in wrapped.declare(sites):
        if isinstance(part, Insertion):
            found[part.site.label] = (
                part.site,
                {name: p.numel() for name, p in part.module.named_parameters()},
            )
            continue
        assert isinstance(part, Tuning)
        assert part.layer is not None
        label, _, name = part.label.rpartition(".")
        site = replace(sites(part.layer, label.rpartition(".")[2]), side="output")
        parameter = sites.model.get_parameter(part.path)
        if not isinstance(site.module, nn.LayerNorm) or labels.setdefault(id(parameter), label) != label:
            raise UnsupportedError(
                f"Subspace({wrapped}) needs a LayerNorm of its own in every layer, and {site.path} of this "
                f"{type(sites.model).__name__} is none; an adapter without norms, such as Hadamard(norm=None), can be "
                "wrapped"
            )
        found.setdefault(label, (site, {}))[1][name] = parameter.numel()
    return list(found.values())


_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """In the block, a `Subspace` is attached without its basis: the directions are zero until they are loaded."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)
