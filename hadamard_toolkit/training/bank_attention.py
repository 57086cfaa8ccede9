"""Attention under `torch.func.vmap`: the runs of a bank are folded into the batch before the fused kernel.

PyTorch has no batching rule for its fused attention kernels and would call them once per run. Masks are always built,
since under vmap one cannot ask whether any position is padded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _Folded(torch.autograd.Function):
    """`attend(query, key, value, mask, bias)`, its batching rule being to make the runs a part of the batch."""

    generate_vmap_rule = False

    @staticmethod
    def forward(attend: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return attend(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # under vmap the rule below runs instead, and autograd sees its operations

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("attention of a bank is differentiated outside of vmap")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], attend: Callable[..., Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        runs = info.batch_size
        query, query_dim = tensors[0], in_dims[1]
        assert query is not None
        rows = query.shape[0] if query_dim is None else query.movedim(query_dim, 0).shape[1]
        folded = [_fold(tensor, dim, runs, rows) for tensor, dim in zip(tensors, in_dims[1:], strict=True)]
        return attend(*folded).unflatten(0, (runs, rows)), 0


def _fold(tensor: Tensor | None, dim: int | None, runs: int, rows: int) -> Tensor | None:
    """[rows, …] of each run as [runs · rows, …]; a single row for all runs and rows stays one."""
    if tensor is None:
        return None
    if dim is None:
        return tensor if len(tensor) == 1 else tensor.repeat(runs, *[1] * (tensor.ndim - 1))
    tensor = tensor.movedim(dim, 0)
    if tensor.shape[1] != rows:  # one row for all rows of a run
        tensor = tensor.expand(-1, rows, *tensor.shape[2:])
    return tensor.flatten(0, 1)


def _attention(
    original: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        extra = {} if bias is None else {"position_bias": bias}
        output: Tensor = original(module, query, key, value, mask, **extra, **options)[0]
        return output

    return _Folded.apply(attend, query, key, value, attention_mask, position_bias), None


def _mask(original: Callable[..., Any], **options: Any) -> Any:
    return original(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


# Registry of transformers, name in it, and what stands in for the function of that name.
_STAND_INS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (ALL_ATTENTION_FUNCTIONS, "sdpa", _attention),
    (ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", _mask),
    (ALL_MASK_ATTENTION_FUNCTIONS, "eager", _mask),
)
_lock, _blocks = threading.Lock(), 0


@contextmanager
def folded_attention() -> Iterator[None]:
    """Inside the block, models with `attn_implementation` "sdpa" or "eager" can run under vmap, and there only."""
    global _blocks
    with _lock:
        _blocks += 1
        if _blocks == 1:
            for functions, name, stand_in in _STAND_INS:
                functions[name] = partial(stand_in, functions[name])
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                for functions, name, _ in _STAND_INS:
                    del functions[name]
