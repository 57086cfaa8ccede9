"""What an adapter is: a frozen dataclass that declares its parts, a registry line, and nothing else.

An adapter never touches a model. It says which modules go to which sites (`Insertion`) and which parameters
of the backbone train with them (`Tuning`); `attach` does the wiring, and undoes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor, nn

from hadamard_toolkit.adapters.passing import Passing
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_choice, check_range
from hadamard_toolkit.sites import Site, Sites, as_index

ROLES = ("adapter", "norm", "gate", "head")
NORMS = {
    "attention": ("attention_norm",),
    "output": ("ffn_norm",),
    "both": ("attention_norm", "ffn_norm"),
    None: (),
}
Layers = str | tuple[int, ...]


class SiteModule(nn.Module):
    """The part of an adapter that sits at one site; its parameters are the adapter's own."""

    gates: ClassVar[tuple[str, ...]] = ()  # names of parameters with the role "gate"
    projections: ClassVar[tuple[str, ...]] = ()  # names of the weight matrices that may be pruned
    frozen: tuple[str, ...] = ()  # names of parameters that are stored but never train
    choosing: ClassVar[tuple[str, ...]] = ()  # names of parameters that enter through a softmax alone …
    choices: int = 0  # … over so many
    added: int = 0  # positions that this part adds to the model's input

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """`hidden` [..., width of the site], replaced. `inputs` is what the site's module read."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """What a file keeps of this part, by name: its parameters, or a smaller form of the same function."""
        return dict(self.named_parameters())

    def take_form(self, names: set[str]) -> None:
        """Take the form whose parameters are `names`, in place, where this part has several. Called before loading."""

    @property
    def shifts(self) -> bool:
        """Whether `fold` needs the site's module to have a bias."""
        return False

    def fold(self, site: Site) -> None:
        """Fold this part into the weights of the site's module, exactly. Parts that can be merged override it."""
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

    A subclass with another way into the model overrides `connect`. The hooks are methods of this object, not
    closures, so that a deep copy of the model stays whole.
    """

    site: Site
    module: SiteModule
    source: Site | None = None
    _passing: Passing = field(default_factory=Passing, repr=False)

    def connect(self) -> list[Any]:
        """Wire it in; every handle's `remove()` takes its wire out again."""
        handles = []
        if self.source is not None:
            look = self.source.module
            if self.source.side == "input":
                handles.append(look.register_forward_pre_hook(self._note_input))
            else:
                handles.append(look.register_forward_hook(self._note_output))
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
        if self.site.projection_slice is None:
            return self.module(output, inputs)
        return self.site.projection_slice.write(
            output, self.module(self.site.projection_slice.read(output), inputs)
        )


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
    """Base of all adapters: a frozen, hashable, JSON-able description of a method."""

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for given in fields:
            if given not in known:
                raise ArgumentError(_unknown_field(cls.__name__, given, fields[given], known))
        return super().__new__(cls)

    def declare(self, sites: Sites) -> Iterator[Declared]:
        """The parts of this adapter on the model of `sites`, in wiring order."""
        raise NotImplementedError


# What peft and AdapterHub call these fields: the name there -> the name here, and how the values differ.
_ALIASES: dict[str, tuple[str, str]] = {
    "r": ("rank", ""),
    "lora_r": ("rank", ""),
    "lora_alpha": ("alpha", ""),
    "lora_dropout": ("dropout", ""),
    "target_modules": ("targets", "sites such as 'query' and 'value'"),
    "feedforward_modules": ("targets", "sites such as 'ffn_hidden'"),
    "num_virtual_tokens": ("length", ""),
    "prefix_length": ("length", ""),
    "prompt_length": ("length", ""),
    "encoder_hidden_size": ("bottleneck", ""),
    "prefix_projection": ("bottleneck", "a width, or None"),
    "bottleneck_size": ("bottleneck", ""),
    "reduction_factor": ("bottleneck", "the hidden size divided by the factor"),
    "non_linearity": ("activation", ""),
    "adapter_dropout": ("dropout", ""),
    "scaling": ("scale", ""),
    "layers_to_transform": ("layers", ""),
    "leave_out": ("layers", "those to keep"),
    "init_lora_weights": ("init", ""),
    "init_weights": ("init", ""),
    "use_gating": ("gated", "'original', 'masked' or None"),
}


def _unknown_field(adapter: str, name: str, value: Any, known: list[str]) -> str:
    alias, difference = _ALIASES.get(name, ("", ""))
    if alias not in known:
        alias, difference = next(iter(difflib.get_close_matches(name, known, 1)), ""), ""
    hint = f"did you mean {alias}{f' ({difference})' if difference else ''}? " if alias else ""
    fields = f"its fields are {', '.join(known)}" if known else "it has no fields"
    return f"{adapter}({name}={value!r}) is not allowed; {hint}{fields}"


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
        if isinstance(value, np.generic):
            return value.item()
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {field.name: plain(getattr(adapter, field.name)) for field in dataclasses.fields(adapter)}
    return {"adapter": type(adapter).__name__, **fields}


def adapter_from_dict(record: dict[str, Any]) -> Adapter:
    """The inverse of `adapter_to_dict`."""

    def rich(value: Any) -> Any:
        if isinstance(value, dict):
            return adapter_from_dict(value)
        return tuple(rich(item) for item in value) if isinstance(value, list) else value

    values = dict(record)
    name = values.pop("adapter", None)
    check_choice("adapter", name, REGISTRY)
    adapter = REGISTRY[name]
    known = [field.name for field in dataclasses.fields(adapter)]
    for given in values:
        check_choice(f"field of {name}", given, known)
    return adapter(**{given: rich(value) for given, value in values.items()})


def check_layers(layers: Any) -> Layers:
    """Normalise a `layers` field to `"all"` or a sorted tuple of indices."""
    if isinstance(layers, str) and layers == "all":
        return "all"
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise ArgumentError(
            f"layers={layers!r} is not allowed; give 'all' or the indices of layers, e.g. (0, 3, 7)"
        )
    chosen = tuple(layers)
    indices = set[int]()
    for layer in chosen:
        index = as_index(layer)
        if index is None:
            raise ArgumentError(f"layers={chosen!r} is not allowed: {layer!r} is not the index of a layer")
        indices.add(index)
    return tuple(sorted(indices))


def check_targets(targets: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Normalise a `targets` field to a tuple in the order of `allowed`."""
    if isinstance(targets, str) or not hasattr(targets, "__iter__") or not tuple(targets):
        raise ArgumentError(
            f"targets={targets!r} is not allowed; give a tuple of sites, e.g. ({allowed[0]!r},)"
        )
    chosen = tuple(targets)
    for target in chosen:
        check_choice("targets", target, allowed)
    return tuple(target for target in allowed if target in chosen)


def check_count(argument: str, value: Any) -> None:
    """Raise `ArgumentError` unless `value` is a whole number of at least 1."""
    if as_index(value) is None:
        raise ArgumentError(f"{argument}={value!r} is not allowed; it must be a whole number")
    check_range(argument, value, least=1)


def norm_tunings(sites: Sites, layers: Layers, norm: str | None) -> Iterator[Tuning]:
    """Train the norms that `norm` ("attention", "output", "both" or None) names, in `layers`."""
    for layer in sites.layers(layers):
        for name in NORMS[norm]:
            site = sites(layer, name)
            for parameter, _ in site.module.named_parameters():
                yield Tuning(f"{site.path}.{parameter}", "norm", f"layers.{layer}.{name}.{parameter}", layer)
