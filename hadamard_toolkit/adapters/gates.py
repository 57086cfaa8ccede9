"""Gates (Mao et al. 2022): one learned number per example that says how much a method contributes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.adapters.passing import named, refuse_cache
from hadamard_toolkit.errors import DataError, UnsupportedError, check_choice
from hadamard_toolkit.sites import Sites

GATED = (None, "original", "masked")


class Input(NamedTuple):
    """What a stack of layers reads: [batch, positions], and which positions are no padding (None: all)."""

    shape: tuple[int, ...]
    mask: Tensor | None


class Current(threading.local):
    """The `input` of the forward pass that this thread is in, or None outside of one; a copy starts with None."""

    input: Input | None = None

    @contextmanager
    def reading(self, read: Input | None) -> Iterator[None]:
        """In the block, `read` is the input."""
        before, self.input = self.input, read
        try:
            yield
        finally:
            self.input = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Current:
        return Current()

    def __reduce__(self) -> tuple[type[Current], tuple[()]]:
        return Current, ()


class Gate(nn.Module):
    """g = mean over positions of σ(w·x + b): [batch, positions, width] in, [batch, 1, 1] out (section 3.2).

    `mode="original"` takes the mean over all positions, padding included, as the authors' code does; with
    `"masked"` padding does not count (where an encoder is called without a mask, nothing is padding).
    w ~ N(0, 0.02²) and b = 0, so that a fresh gate stands near one half.

    Raises, when the model runs, `UnsupportedError` where a gate would see a part of the sequence alone: with a filled
    cache of keys and values, or with `chunk_size_feed_forward`.
    """

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        check_choice("gated", mode, [mode for mode in GATED if mode])
        self.weight = nn.Parameter(torch.randn(width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mode = mode
        self.current = Current()  # `listen` replaces it by the one that all gates of a stack share

    def forward(self, read: Tensor) -> Tensor:
        if read.ndim != 3:
            raise UnsupportedError(
                f"a gate reads [batch, positions, width], and this model passes {tuple(read.shape)}"
            )
        whole = self.current.input
        if whole is not None and tuple(read.shape[:2]) != whole.shape:
            raise UnsupportedError(
                f"a gate needs the whole input [batch, positions] = {whole.shape} at once, and this model passes "
                f"{tuple(read.shape[:2])}; set chunk_size_feed_forward=0"
            )
        opening = torch.sigmoid(read.to(self.weight.dtype) @ self.weight + self.bias)
        if self.mode == "original":
            return opening.mean(-1)[:, None, None]
        if whole is None:
            raise UnsupportedError(
                "gated='masked' needs the padding mask that the model is called with; call the model, not its layers"
            )
        if whole.mask is None:
            return opening.mean(-1)[:, None, None]
        if getattr(whole.mask, "shape", None) != opening.shape:
            raise DataError(
                f"gated='masked' needs an attention_mask [batch, positions] = {whole.shape} like the input, or none, "
                f"and this has {tuple(getattr(whole.mask, 'shape', ()))}"
            )
        counted = whole.mask.to(opening.dtype)
        return ((opening * counted).sum(-1) / counted.sum(-1).clamp(min=1))[:, None, None]


class _Stack:
    """Tells the gates in a stack of layers what the stack reads, from each call to its end, until `remove`."""

    def __init__(self, module: nn.Module, *, padding: int | None, starts_with_padding: bool) -> None:
        self.current = Current()
        self._padding, self._starts_with_padding = padding, starts_with_padding
        self._layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._hooks = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            checkpoint = vars(layer).get(_CHECKPOINT)
            if isinstance(checkpoint, _Checkpoint):
                setattr(layer, _CHECKPOINT, checkpoint.checkpoint)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(module, args, kwargs)
        refuse_cache(given, "a gate")
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        read = given.get("inputs_embeds") if ids is None else ids
        if read is None:
            return  # the model says what is missing
        shape = tuple(read.shape[:2])
        if mask is None and ids is not None and self._padding is not None:
            mask = self._decoded(ids, self._padding)
        self.current.input = Input(shape, mask)
        for layer in self._layers:
            checkpoint = vars(layer).get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
                setattr(layer, _CHECKPOINT, _Checkpoint(checkpoint, self.current))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.current.input = None

    def _decoded(self, ids: Tensor, padding: int) -> Tensor:
        """Which positions of a decoder's input have a token to tell: the next one is no padding.

        So a row counts the same positions in a padded batch as alone, where its last token is not in the input.
        """
        real = ids.ne(padding)
        following = torch.cat([real[:, 1:], torch.ones_like(real[:, :1])], 1)
        if self._starts_with_padding:  # then the last padding before the first token is the start
            real = real | (real.int().cumsum(1) == 0)
        return following & real


_CHECKPOINT = "_gradient_checkpointing_func"  # attribute of a layer whose activations are computed again


class _Checkpoint:
    """The checkpointing function of a layer; what is computed again reads what was read the first time."""

    def __init__(self, checkpoint: Callable[..., Any], current: Current) -> None:
        self.checkpoint, self.current = checkpoint, current

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        read = self.current.input

        def again(*args: Any) -> Any:
            with self.current.reading(read):
                return layer(*args)

        return self.checkpoint(again, *args)


def listen(sites: Sites, insertions: Sequence[Insertion]) -> list[Any]:
    """Let the gates of `insertions` see what their stack of layers reads; handles, or none without gates.

    Call it after all other wiring, so that they see what the stack reads in the end.
    """
    base: Any = sites.base
    config = sites.model.config
    stacks = [base.encoder, base.decoder] if config.is_encoder_decoder else [base]
    handles = []
    for stack in stacks:
        inside = set(stack.modules())
        parts = [insertion.module for insertion in insertions if insertion.site.module in inside]
        gates = [module for part in parts for module in part.modules() if isinstance(module, Gate)]
        if gates:
            # a decoder hides padding by its order alone, so that masks are left out
            padding = config.pad_token_id if config.is_encoder_decoder and stack is base.decoder else None
            first = getattr(config, "decoder_start_token_id", None)
            handle = _Stack(stack, padding=padding, starts_with_padding=first == padding)
            handles.append(handle)
            for gate in gates:
                gate.current = handle.current
    return handles


def check_gate(sites: Sites, target: str) -> None:
    """Raise `UnsupportedError` where what the projection `target` reads is not the examples alone."""
    if sites.projects_positions(target):
        raise UnsupportedError(
            f"gated LoRA cannot be at {target!r} of a {sites.model.config.model_type} with share_att_key=True: that "
            "projection also reads the table of relative positions, which is no example; leave the gate out, or "
            "choose other targets"
        )
