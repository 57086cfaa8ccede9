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
    """What a stack of layers reads: its shape [batch, positions], and a mask that is 0 at padding, or None."""

    shape: tuple[int, ...]
    mask: Tensor | None


class Current(threading.local):
    """The `input` of this thread's forward pass, or None outside of one; a copy starts with None."""

    input: Input | None = None

    @contextmanager
    def reading(self, read: Input | None) -> Iterator[None]:
        """Make `read` the input inside the block."""
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
    """g = mean over positions of σ(w·x + b): x [batch, positions, width] in, g [batch, 1, 1] out (section 3.2).

    `mode="original"` takes the mean over all positions, padding included, as the authors' code does; `"masked"` leaves
    padding out (an encoder that is called without a mask has none). w ~ N(0, 0.02²) and b = 0, so that a fresh gate is
    near one half.

    When the model runs, it raises `UnsupportedError` if the gate would see only a part of the sequence: with a filled
    cache of keys and values, or with `chunk_size_feed_forward`.
    """

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        check_choice("gated", mode, [mode for mode in GATED if mode])
        self.weight = nn.Parameter(torch.randn(width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mode = mode
        # `listen` replaces it by one that all gates of a stack share.
        self.current = Current()

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
    """Tells the gates in a stack of layers what the stack reads in each call, until `remove`."""

    def __init__(self, module: nn.Module, config: Any = None) -> None:
        """`config` of the model where `module` is a decoder: its padding id may change after attaching."""
        self.current, self._config = Current(), config
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
        arguments = named(module, args, kwargs)
        refuse_cache(arguments, "a gate")
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        read = arguments.get("inputs_embeds") if ids is None else ids
        if read is None:
            # The model itself raises an error about the missing input.
            return
        shape = tuple(read.shape[:2])
        padding = getattr(self._config, "pad_token_id", None)
        if mask is None and ids is not None and padding is not None:
            mask = self._decoded(ids, padding)
        self.current.input = Input(shape, mask)
        for layer in self._layers:
            checkpoint = vars(layer).get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
                setattr(layer, _CHECKPOINT, _Checkpoint(checkpoint, self.current))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.current.input = None

    def _decoded(self, ids: Tensor, padding: int) -> Tensor:
        """The positions of a decoder's input that predict a token: they and the next one are no padding.

        So a row counts the same positions in a padded batch as alone, where its last token is not in the input.
        """
        real = ids.ne(padding)
        following = torch.cat([real[:, 1:], torch.ones_like(real[:, :1])], 1)
        if getattr(self._config, "decoder_start_token_id", None) == padding:
            # The padding token right before the first other token is the start token.
            real = real | (real.int().cumsum(1) == 0)
        return following & real


# The attribute of a layer whose activations are computed again in the backward pass.
_CHECKPOINT = "_gradient_checkpointing_func"


class _Checkpoint:
    """The checkpointing function of a layer; the second computation sees the input of the first."""

    def __init__(self, checkpoint: Callable[..., Any], current: Current) -> None:
        self.checkpoint, self.current = checkpoint, current

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        read = self.current.input

        def again(*args: Any) -> Any:
            with self.current.reading(read):
                return layer(*args)

        return self.checkpoint(again, *args)


def listen(sites: Sites, insertions: Sequence[Insertion]) -> list[Any]:
    """Let the gates of `insertions` see what their stack of layers reads; a handle for each stack that has gates.

    Call it after all other wiring, so that they see what the stack finally reads.
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
            # A decoder is often called without a mask, since its causal order hides padding at the end.
            handle = _Stack(stack, config if config.is_encoder_decoder and stack is base.decoder else None)
            handles.append(handle)
            for gate in gates:
                gate.current = handle.current
    return handles


def reads_padding(model: nn.Module) -> bool:
    """Whether a gate of the adapter on `model` takes its mean over padding too."""
    return any(isinstance(module, Gate) and module.mode == "original" for module in model.modules())


def check_gate(sites: Sites, target: str) -> None:
    """Raise `UnsupportedError` where the projection `target` reads more than the examples."""
    if sites.projects_positions(target):
        raise UnsupportedError(
            f"gated LoRA cannot be at {target!r} of a {sites.model.config.model_type} with share_att_key=True: that "
            "projection also reads the table of relative positions, which is no example; leave the gate out, or "
            "choose other targets"
        )
