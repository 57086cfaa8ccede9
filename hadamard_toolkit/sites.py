"""Where an adapter may attach: named sites in every layer, one short table per architecture.

A *site* is a point in a Transformer layer that has one name here and a different module path in every architecture. A
method asks for `attention_output` in layer 3; the table of the architecture says which module that is, and on which
side of it. No method names an architecture, and nothing is selected by a substring.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hadamard_toolkit.architectures import (
    ARCHITECTURES,
    POSITIONS_PROJECTED,
    POSITIONS_UNUSED,
    RELATIVE,
    LayerTable,
)
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_choice

SITES = {
    "attention_output": "after the output projection W_O, before dropout, residual and norm",
    "attention_heads": "the concatenated heads, before W_O",
    "query": "the query projection",
    "key": "the key projection",
    "value": "the value projection",
    "ffn_input": "what the feed-forward block reads",
    "ffn_inner": "after the first feed-forward projection, before the activation",
    "ffn_hidden": "the feed-forward activations, before the second projection",
    "ffn_output": "after the second feed-forward projection, before dropout, residual and norm",
    "attention_norm": "the norm that follows the self-attention block",
    "ffn_norm": "the norm that follows the feed-forward block",
    "ffn_residual": "what that norm reads, feed-forward output plus residual (post-norm architectures)",
}


# Site -> row of the table, and the side of the module that the row names.
_WHERE = {
    "attention_output": ("output_projection", "output"),
    "attention_heads": ("output_projection", "input"),
    "query": ("query", "output"),
    "key": ("key", "output"),
    "value": ("value", "output"),
    "ffn_input": ("ffn_first", "input"),
    "ffn_inner": ("ffn_first", "output"),
    "ffn_hidden": ("ffn_second", "input"),
    "ffn_output": ("ffn_second", "output"),
    "attention_norm": ("attention_norm", "module"),
    "ffn_norm": ("ffn_norm", "module"),
    "ffn_residual": ("ffn_norm", "input"),
}
# The rows of the table that are projections of the attention.
_ATTENTION = ("query", "key", "value", "output_projection")


@dataclass(frozen=True)
class ProjectionSlice:
    """Slice `index` of `of` equal slices of a fused projection's last axis, interleaved by head if `heads` > 1."""

    index: int
    of: int
    heads: int = 1

    def read(self, fused: Tensor) -> Tensor:
        """This slice of `fused` [..., of * d] as [..., d]."""
        folded = fused.unflatten(-1, (self.heads, self.of, -1))
        return folded[..., self.index, :].flatten(-2)

    def write(self, fused: Tensor, values: Tensor) -> Tensor:
        """`fused` with this slice replaced, as a new tensor."""
        folded = fused.unflatten(-1, (self.heads, self.of, -1))
        pieces = list(folded.unbind(-2))
        pieces[self.index] = values.unflatten(-1, (self.heads, -1))
        return torch.stack(pieces, -2).flatten(-3)


@dataclass(frozen=True)
class Site:
    """One site of one layer: the module it belongs to, the side of it, and which slice of a fused projection."""

    name: str
    layer: int | None  # None: outside the layers
    path: str  # of the module, in the model
    module: nn.Module
    side: str  # "input" | "output" | "module"
    projection_slice: ProjectionSlice | None = None

    @property
    def label(self) -> str:
        """What the parts at this site are called in files: `layers.3.query`, or the bare name outside the layers."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"

    @property
    def width(self) -> int:
        """Length of the vectors at this site."""
        if self.module.weight.ndim == 1:  # a norm
            return int(self.module.weight.shape[0])  # type: ignore[index]
        fan_in, fan_out = features(self.module)
        if self.side == "input":
            return fan_in
        return fan_out // self.projection_slice.of if self.projection_slice else fan_out

    @property
    def rows(self) -> slice | Tensor:
        """Indices of the rows of `linear_weight(module)`, and of the bias, that make this site's output."""
        if self.projection_slice is None:
            return slice(None)
        return self.projection_slice.read(torch.arange(features(self.module)[1], device="cpu"))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear projection, whichever way it stores its weight."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear projection as a view of shape (out, in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def as_index(value: Any) -> int | None:
    """`value` as an int if it is a whole number, also one of numpy or torch, else None; True and False are not."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _resolve(root: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    for option in path.split("|"):
        try:
            return option, root.get_submodule(option)
        except AttributeError:
            continue
    return None


class Sites:
    """All sites of a model: `sites(layer, name)` gives one, `len(sites)` is the number of layers.

    In encoder-decoder models the encoder's layers come first, then the decoder's; only self-attention counts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        kind = model.config.model_type
        if kind not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture {kind!r} has no table of sites (known: {', '.join(ARCHITECTURES)}). Write one: "
                f"hadamard_toolkit.architectures.ARCHITECTURES[{kind!r}] = (LayerTable(layers='…', "
                "output_projection='…', query='…', key='…', value='…', ffn_first='…', ffn_second='…', "
                "attention_norm='…', ffn_norm='…'),), "
                "with module paths as in dict(model.base_model.named_modules())"
            )
        self.model = model
        self.base: nn.Module = model.base_model
        self._prefix = next(name for name, module in model.named_modules() if module is self.base)
        self._rows: list[tuple[LayerTable, int, int]] = []
        for table in ARCHITECTURES[kind]:
            resolved = _resolve(self.base, table.layers)
            if resolved is None:
                raise UnsupportedError(
                    f"{type(model).__name__} has no {table.layers!r}, where architecture {kind!r} keeps layers: "
                    "only models with all of its layer stacks can carry an adapter"
                )
            count = len(resolved[1])  # type: ignore[arg-type]
            self._rows += [(table, index, count) for index in range(count)]

    def __len__(self) -> int:
        return len(self._rows)

    def layers(self, chosen: str | Iterable[int] = "all") -> list[int]:
        """The indices of the layers `chosen`, sorted; `ArgumentError` for one that the model lacks.

        Negative indices count from the end.
        """
        if isinstance(chosen, str):
            check_choice("layers", chosen, ["all"])
            return list(range(len(self)))
        indices = set()
        for layer in chosen:
            index = as_index(layer)
            if index is None or not -len(self) <= index < len(self):
                raise ArgumentError(
                    f"layers={tuple(chosen)!r} is not allowed: {layer!r} is not a layer of this model, "
                    f"which has layers 0 to {len(self) - 1}"
                )
            indices.add(index % len(self))
        return sorted(indices)

    def layer(self, index: int) -> tuple[str, nn.Module]:
        """Layer `index` as a whole: its path in the model, and the module."""
        [index] = self.layers([index])
        table, step, _ = self._rows[index]
        path = f"{table.layers}.{step}"
        return f"{self._prefix}.{path}" if self._prefix else path, self.base.get_submodule(path)

    def layer_of(self, path: str) -> int | None:
        """The layer that holds the parameter or module `path`, or None for one outside the layers."""
        roots = (self.layer(index)[0] for index in range(len(self)))
        return next((index for index, root in enumerate(roots) if path.startswith(f"{root}.")), None)

    def post_norm(self, layer: int) -> bool:
        """Whether the norms of `layer` follow its residual additions, as in BERT, instead of preceding its blocks."""
        [layer] = self.layers([layer])
        return not self._rows[layer][0].last_norm

    def projects_positions(self, name: str) -> bool:
        """Whether the projection behind the site `name` also reads a table of relative positions (DeBERTa-v3)."""
        config = self.model.config
        switch = POSITIONS_PROJECTED.get(config.model_type)
        if switch is None or name not in ("query", "key"):
            return False
        return bool(config.relative_attention and getattr(config, switch, False))

    def __call__(self, layer: int, name: str) -> Site:
        """The site `name` of `layer`.

        Raises `ArgumentError` for an unknown name or layer, `UnsupportedError` where the model lacks the site.
        """
        check_choice("site", name, SITES)
        [layer] = self.layers([layer])
        table, index, count = self._rows[layer]
        row, side = _WHERE[name]
        if name == "ffn_residual" and not self.post_norm(layer):
            raise UnsupportedError(
                f"{type(self.model).__name__} has no site {name!r} in layer {layer}: its norms come before its blocks"
            )
        path, _, bracket = getattr(table, row).partition("[")
        root = f"{table.layers}.{index}."
        if path.startswith("next:"):
            path = path.removeprefix("next:")
            root = f"{table.layers}.{index + 1}."
            if index + 1 == count:
                root, path = "", table.last_norm
        resolved = _resolve(self.base, "|".join(root + option for option in path.split("|")))
        if resolved is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} has no site {name!r} in layer {layer}: {root + path} is missing"
            )
        path, module = resolved
        if row not in ("attention_norm", "ffn_norm") and getattr(module.weight, "ndim", None) != 2:
            raise UnsupportedError(
                f"{type(self.model).__name__} has a {type(module).__name__} at {path}; the site {name!r} needs a "
                "linear projection (nn.Linear, or Conv1D as in gpt2)"
            )
        return Site(
            name,
            layer,
            f"{self._prefix}.{path}" if self._prefix else path,
            module,
            side,
            self._slice(bracket),
        )

    def bias_switch(self, site: Site) -> str:
        """The entry of the config that gives the module of `site` a bias, or "" if there is none."""
        assert site.layer is not None
        return self._rows[site.layer][0].bias_switch if _WHERE[site.name][0] in _ATTENTION else ""

    def switched_biases(self, switch: str) -> list[nn.Module]:
        """Every module that the entry `switch` of the config gives a bias."""
        modules: dict[str, nn.Module] = {}
        for layer, (table, _, _) in enumerate(self._rows):
            if table.bias_switch == switch:
                for name in ("query", "key", "value", "attention_output"):
                    site = self(layer, name)
                    modules[site.path] = site.module
        return list(modules.values())

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the base model, by its name in the whole model."""
        base = {id(parameter) for parameter in self.base.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in base}

    def _slice(self, bracket: str) -> ProjectionSlice | None:
        if not bracket:
            return None
        index, _, of = bracket.rstrip("]").partition("/")
        heads = self.model.config.num_attention_heads if of.endswith("*") else 1
        return ProjectionSlice(int(index), int(of.rstrip("*")), heads)


def check_model(model: Any) -> None:
    """Raise `ArgumentError`, which says where the plain model is, unless `model` is a plain transformers model."""
    kind = type(model)
    if isinstance(model, PreTrainedModel):
        wrapped = [name for name, part in model.named_modules() if _is_of_peft(part)]
        if wrapped:
            raise ArgumentError(
                f"model is a {kind.__name__} that peft has changed, at {wrapped[0]!r} first; take peft's adapter off "
                "(its unload() or merge_and_unload()), or bring it along with import_peft"
            )
        return
    if _is_of_peft(model):
        raise ArgumentError(
            f"model is a {kind.__name__}; take peft's adapter off (its unload() or merge_and_unload()) and attach "
            "to the plain model, or bring it along with import_peft"
        )
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    for path, part in parts:
        if isinstance(part, PreTrainedModel):
            raise ArgumentError(
                f"model is a {kind.__name__} around a {type(part).__name__}; attach to that one, model.{path}, "
                "and wrap it afterwards"
            )
    raise ArgumentError(
        f"model is a {kind.__name__}; an adapter needs a transformers model (PreTrainedModel)"
    )


def _is_of_peft(module: Any) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The task head: every parameter of `model` outside its base model, by name."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in base}


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input in tokens for which `model` has learned positions, or None if there is no limit."""
    unused = POSITIONS_UNUSED.get(model.config.model_type)
    if model.config.model_type in RELATIVE and model.config.position_biased_input:
        unused = 0
    if unused is None:
        return None
    return int(model.config.max_position_embeddings) - (
        model.config.pad_token_id + 1 if unused == "padding" else int(unused)
    )
