"""Keys and values in front of a self-attention: how prefixes enter each architecture.

Most architectures of `transformers` call their attention by name through its attention interface. An attention module
that carries prefixes sees a view of its config with our name in place of the model's own; our function puts the
prefixes in front of keys and values and calls the implementation that the model asks for (eager, sdpa or flash
attention). Nothing else sees the name, so masks and all other modules are unaffected. The few architectures that
compute attention themselves (mpnet, deberta, deberta-v2) get a forward pass that is written out here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites

NAME = "hadamard_prefix"
# The attribute of an attention module that lists the prefixes it carries.
_CARRIED = "hadamard_prefixes"
_EAGER = "eager_attention_forward"


class KeysAndValues(Protocol):
    """A prefix."""

    def keys_and_values(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, length, width of a head]; batch, heads and type are those of `like`."""
        ...


class Carried:
    """Makes the attention module `host` carry `prefix`; `remove` undoes that and leaves `host` as it was."""

    def __init__(self, host: nn.Module, prefix: KeysAndValues, architecture: str) -> None:
        self.host, self.prefix = host, prefix
        check_host(host, architecture)
        if _CARRIED not in vars(host):
            setattr(host, _CARRIED, [])
            if architecture in _WRITTEN_OUT:
                host.forward = _Forward(host, _WRITTEN_OUT[architecture])
            else:
                host.config = _ConfigView(host.config)  # type: ignore[assignment]
        vars(host)[_CARRIED].append(prefix)

    def remove(self) -> None:
        carried = vars(self.host)[_CARRIED]
        carried.remove(self.prefix)
        if carried:
            return
        delattr(self.host, _CARRIED)
        if "forward" in vars(self.host):
            del self.host.forward
        else:
            self.host.config = self.host.config._original  # type: ignore[union-attr]


def attention_of(sites: Sites, layer: int) -> tuple[str, nn.Module]:
    """The path of the self-attention module of `layer`, which holds the key projection, and the module."""
    path = sites(layer, "key").path.rpartition(".")[0]
    return path, sites.model.get_submodule(path)


def check_host(host: nn.Module, architecture: str) -> None:
    """Raise `UnsupportedError` unless prefixes can enter the attention module `host` of `architecture`."""
    through_interface = hasattr(host, "config") and hasattr(sys.modules[type(host).__module__], _EAGER)
    if architecture not in _WRITTEN_OUT and not through_interface:
        raise UnsupportedError(
            f"prefixes cannot enter {type(host).__name__} of architecture {architecture!r}: it does not go through "
            "the attention interface of transformers"
        )
    if getattr(host, "head_logits_proj", None) is not None:
        raise UnsupportedError(
            f"prefixes cannot enter a {architecture} with talking heads (config.talking_head)"
        )


class _ConfigView:
    """A view of a model's config with another name of the attention implementation."""

    _attn_implementation = NAME

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        # A copy asks for attributes before it has an original.
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(self._original, name)


def _prefixes(host: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [prefix.keys_and_values(like) for prefix in vars(host)[_CARRIED]]
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def _with_prefixes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as `NAME`; query, key and value are [batch, heads, positions, width]."""
    view: Any = module.config
    name: str = view._original._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], _EAGER)
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    flash = name.startswith("flash_attention")
    if name not in ("eager", "sdpa") and not flash:
        raise UnsupportedError(
            f"attn_implementation={name!r} cannot carry prefixes; eager, sdpa and flash attention can"
        )
    if flash and options.get("sliding_window") is not None:
        raise UnsupportedError(
            f"attn_implementation={name!r} with a sliding window cannot carry prefixes; sdpa can"
        )
    keys, values = _prefixes(module, key)
    length = keys.shape[2]
    if attention_mask is None and name == "sdpa" and query.shape[2] > 1 and _is_causal(module, options):
        # sdpa would make the causal mask itself, and the first query would then see only the first prefix key.
        attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        # What is visible has 0 in additive masks of scores, 1 in boolean masks and in masks of tokens.
        additive = attention_mask.dtype != torch.bool and attention_mask.ndim == 4
        attention_mask = _widened(attention_mask, length, 0 if additive else 1)
    if options.get("position_bias") is not None:
        options["position_bias"] = _widened(options["position_bias"], length, 0)
    output: tuple[Tensor, Tensor | None] = implementation(
        module, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), attention_mask, **options
    )
    return output


AttentionInterface.register(NAME, _with_prefixes)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    is_causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _widened(mask: Tensor, length: int, fill: float) -> Tensor:
    """`mask` [..., key] with `length` more columns of `fill` in front."""
    return torch.cat([mask.new_full((*mask.shape[:-1], length), fill), mask], -1)


# architectures that compute attention themselves ----------------------------------------------------------------


class _Scored(NamedTuple):
    """A self-attention up to its softmax: the scaled query, and `scores` [batch, heads, query, key] with all biases.

    `finish` computes the output of the module from the context [batch, query, width] and the probabilities.
    """

    query: Tensor
    value: Tensor
    scores: Tensor
    finish: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class _Forward:
    """The forward pass of an attention module that carries prefixes."""

    def __init__(self, host: nn.Module, score: Callable[..., _Scored]) -> None:
        self.host, self.score = host, score

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        query, value, scores, finish = self.score(self.host, *arguments, **options)
        keys, values = _prefixes(self.host, value)
        probabilities = torch.cat([query @ keys.mT, scores], -1).softmax(-1)
        probabilities = self.host.dropout(probabilities)  # type: ignore[operator]
        context = probabilities @ torch.cat([values, value], 2)
        return finish(context.transpose(1, 2).flatten(-2), probabilities)


def _heads(host: Any, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (host.num_attention_heads, -1)).transpose(1, 2)


def _mpnet(
    host: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> _Scored:
    query, key, value = (_heads(host, part(hidden_states)) for part in (host.q, host.k, host.v))
    query = query / math.sqrt(host.attention_head_size)
    scores = query @ key.mT
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask

    def finish(context: Tensor, probabilities: Tensor) -> tuple[Tensor, ...]:
        return (host.o(context), probabilities) if output_attentions else (host.o(context),)

    return _Scored(query, value, scores, finish)


def _deberta_v2(
    host: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> _Scored:
    asking = hidden_states if query_states is None else query_states
    query = _heads(host, host.query_proj(asking))
    key, value = (_heads(host, part(hidden_states)) for part in (host.key_proj, host.value_proj))
    factor = 1 + ("c2p" in host.pos_att_type) + ("p2c" in host.pos_att_type)
    scaled = query / math.sqrt(query.shape[-1] * factor)
    scores = scaled @ key.mT
    if host.relative_attention:
        table = host.pos_dropout(rel_embeddings)
        bias = host.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), relative_pos, table, factor
        )
        scores = scores + bias.unflatten(0, scores.shape[:2])
    return _Scored(scaled, value, _masked(scores, attention_mask), _deberta_output(output_attentions))


def _deberta(
    host: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> _Scored:
    if query_states is not None:
        raise UnsupportedError(
            "deberta with query_states of its own (an enhanced mask decoder) cannot carry prefixes"
        )
    query, key, value = host.transpose_for_scores(host.in_proj(hidden_states)).chunk(3, dim=-1)
    query = query + host.transpose_for_scores(host.q_bias[None, None])
    value = value + host.transpose_for_scores(host.v_bias[None, None])
    factor = 1 + len(host.pos_att_type)
    query = query / math.sqrt(query.shape[-1] * factor)
    scores = query @ key.mT
    if host.relative_attention and rel_embeddings is not None and relative_pos is not None:
        table = host.pos_dropout(rel_embeddings)
        scores = scores + host.disentangled_att_bias(query, key, relative_pos, table, factor)
    return _Scored(query, value, _masked(scores, attention_mask), _deberta_output(output_attentions))


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min)


def _deberta_output(output_attentions: bool) -> Callable[[Tensor, Tensor], tuple[Any, ...]]:
    return lambda context, probabilities: (context, probabilities if output_attentions else None)


_WRITTEN_OUT: dict[str, Callable[..., _Scored]] = {
    "mpnet": _mpnet,
    "deberta": _deberta,
    "deberta-v2": _deberta_v2,
}
