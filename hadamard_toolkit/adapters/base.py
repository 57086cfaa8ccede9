"""What an adapter is: a frozen dataclass that declares its parts, a registry line, and nothing else.

An adapter never touches a model. It says which modules go to which sites (`Insertion`) and which parameters
of the backbone train with them (`Tuning`); `attach` does the wiring, and undoes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from hadamard_toolkit.adapters.fields import Layers, check_fields, check_known
from hadamard_toolkit.adapters.passing import Passing
from hadamard_toolkit.errors import UnsupportedError, check_choice
from hadamard_toolkit.sites import Site, Sites

ROLES = ("adapter", "norm", "gate", "head")
NORMS = {
    "attention": ("attention_norm",),
    "output": ("ffn_norm",),
    "both": ("attention_norm", "ffn_norm"),
    None: (),
}


class SiteModule(nn.Module):
    """The part of an adapter that sits at one site; its parameters are the adapter's own."""

    # Names of parameters with the role "gate".
    gates: ClassVar[tuple[str, ...]] = ()
    # Names of the weight matrices that may be pruned.
    projections: ClassVar[tuple[str, ...]] = ()
    # Names of parameters that enter the output through a softmax alone, over `choices` entries.
    choosing: ClassVar[tuple[str, ...]] = ()
    choices: int = 0
    # Names of parameters that are stored but never train.
    frozen: tuple[str, ...] = ()
    # How many positions this part adds to the model's input.
    added: int = 0
    # What it computes, for drawings, such as "A′ = g · A".
    formula: str = ""

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """What replaces `hidden` [..., width of the site]; `inputs` is what the site's module reads."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a file keeps of this part, by name: its parameters, or a smaller form of them."""
        return dict(self.named_parameters())

    def take_form(self, names: set[str]) -> None:
        """Change to the form whose parameters are `names`, if this part has several; called before loading."""

    @property
    def shifts(self) -> bool:
        """Whether `fold` adds to the bias of the site's module, which gets one of zeros before if it has none."""
        return False

    def fold(self, site: Site) -> None:
        """Fold this part exactly into the weights of the site's module. Parts that can be merged override it."""
        self.check_fold(site)

    def check_fold(self, site: Site) -> None:
        """Raise `UnsupportedError` unless `fold` works at `site`."""
        if type(self).fold is SiteModule.fold:
            raise UnsupportedError(
                f"{type(self).__name__} at {site.name} is not linear in its input: it cannot be merged"
            )


@dataclass(frozen=True, eq=False)
class Insertion:
    """Put `module` at `site`. With a `source`, its `inputs` are what passed that site in the same forward pass.

    A subclass that enters the model in another way overrides `connect`. The hooks are methods of this object and not
    closures, so that a deep copy of the model stays whole.
    """

    site: Site
    module: SiteModule
    source: Site | None = None
    _passing: Passing = field(default_factory=Passing, repr=False)

    def connect(self) -> list[Any]:
        """Wire the module into the model; the `remove()` of every handle undoes its part of that."""
        handles = []
        if self.source is not None:
            source = self.source.module
            if self.source.side == "input":
                handles.append(source.register_forward_pre_hook(self._note_input))
            else:
                handles.append(source.register_forward_hook(self._note_output))
        host = self.site.module
        if self.site.side == "output":
            return [*handles, host.register_forward_hook(self._on_output)]
        return [*handles, host.register_forward_pre_hook(self._on_input)]

    def _note_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._passing["inputs"] = args[0]

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._passing["inputs"] = output

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.module(args[0], self._passing.pop("inputs", args[0])), *args[1:])

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs = self._passing.pop("inputs", args[0])
        projection_slice = self.site.projection_slice
        if projection_slice is None:
            return self.module(output, inputs)
        return projection_slice.write(output, self.module(projection_slice.read(output), inputs))


@dataclass(frozen=True)
class Tuning:
    """Train the backbone's own parameter `path` under `role`; `label` names it in files and vectors."""

    path: str
    role: str
    label: str
    layer: int | None = None


Declared = Insertion | Tuning


@dataclass(frozen=True)
class Adapter:
    """Base of all adapters: a frozen, hashable, JSON-able description of a method.

    Its fields are declared with the functions of `adapters.fields`, which say what is allowed in them.
    """

    # Fields that decide nothing but values that never train; runs that are trained together may differ in them.
    values_only: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **values: Any) -> Self:
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in values.items():
            check_known(cls.__name__, name, value, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)

    def declare(self, sites: Sites) -> Iterator[Declared]:
        """Yield the parts of this adapter on the model of `sites`, in the order in which they are wired."""
        raise NotImplementedError


REGISTRY: dict[str, type[Adapter]] = {}


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: make an adapter known by its class name."""
    REGISTRY[adapter.__name__] = adapter
    return adapter


def adapter_to_dict(adapter: Adapter) -> dict[str, Any]:
    """`{"adapter": class name, field: value, …}`, ready for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Adapter):
            return adapter_to_dict(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {field.name: plain(getattr(adapter, field.name)) for field in dataclasses.fields(adapter)}
    return {"adapter": type(adapter).__name__, **fields}


def form_of(adapter: Adapter) -> dict[str, Any]:
    """`adapter_to_dict` without the fields `values_only`."""
    record = adapter_to_dict(adapter)
    return {name: value for name, value in record.items() if name not in adapter.values_only}


def adapter_from_dict(record: dict[str, Any]) -> Adapter:
    """The inverse of `adapter_to_dict`; `ArgumentError` for an unknown adapter or field."""

    def rich(value: Any) -> Any:
        if isinstance(value, dict):
            return adapter_from_dict(value)
        return tuple(rich(item) for item in value) if isinstance(value, list) else value

    values = {field: rich(value) for field, value in record.items()}
    name = values.pop("adapter", None)
    check_choice("adapter", name, REGISTRY)
    return REGISTRY[name](**values)


def norm_tunings(sites: Sites, layers: Layers, norm: str | None) -> Iterator[Tuning]:
    """Train the norms that `norm` ("attention", "output", "both" or None) names, in `layers`."""
    for layer in sites.layers(layers):
        for name in NORMS[norm]:
            site = sites(layer, name)
            for parameter, _ in site.module.named_parameters():
                yield Tuning(f"{site.path}.{parameter}", "norm", f"layers.{layer}.{name}.{parameter}", layer)
