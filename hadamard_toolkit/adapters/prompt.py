"""Prompt tuning (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.attention import attention_of
from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule, register
from hadamard_toolkit.adapters.fields import one_of, whole
from hadamard_toolkit.adapters.passing import named, refuse_cache
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.sites import Site, Sites, position_limit

INITS = ("uniform", "normal", "vocabulary")
POSITIONS = ("auto", "front", "behind-first")
# The attribute of a reader that lists the prompts in its input, in the order in which they enter.
_STANDING = "hadamard_prompts"


class Prompt(SiteModule):
    """`weight` [length, width], which enters embeddings after their first `place` rows.

    Where padding comes first, each row of a batch has its own `start` [batch, 1].
    """

    def __init__(self, vectors: Tensor, place: int, *, behind_padding: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors)
        self.behind_first, self.place, self.added = bool(place), place, len(vectors)
        self.behind_padding = behind_padding or self.behind_first

    def __len__(self) -> int:
        return len(self.weight)

    def start(self, rows: Tensor, mask: Tensor | None, in_front: int) -> Tensor:
        """Where the prompt starts in each of `rows`: `place` positions behind the padding by `mask`, or behind nothing.

        `in_front` columns of the mask are those of other prompts.
        """
        start = torch.full((len(rows), 1), self.place, device=rows.device)
        return start + self.padding(rows, mask, in_front) if self.behind_padding else start

    def padding(self, rows: Tensor, mask: Tensor | None, in_front: int) -> Tensor:
        """How many positions of padding each of `rows` begins with [batch, 1]."""
        if mask is None:
            return torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        return (mask[:, in_front:] != 0).int().argmax(1, keepdim=True)

    def forward(self, hidden: Tensor, inputs: Tensor, start: Tensor | None = None) -> Tensor:
        """`hidden` [batch, positions, width] with the `length` vectors of the prompt among its positions."""
        start = self.start(hidden, None, 0) if start is None else start
        return self._put(self._vectors(hidden), hidden, start)

    def spread(self, row: Tensor, fill: int, start: Tensor) -> Tensor:
        """`row` [batch, positions] with `fill` at the positions of the prompt."""
        return self._put(row.new_full((len(row), len(self)), fill), row, start)

    def positions(self, row: Tensor, start: Tensor, first: Tensor) -> Tensor:
        """Position ids `row` [batch, positions] with those of the prompt, and later ones moved on.

        `first` [batch, 1] is the first position that is no padding.
        """
        row = row.expand(len(start), -1)
        here = row.gather(1, first) + int(self.behind_first) + torch.arange(len(self), device=row.device)
        later = torch.arange(row.shape[1], device=row.device) >= start
        return self._put(here, row + len(self) * later, start)

    def replace(self, hidden: Tensor, start: Tensor) -> Tensor:
        """`hidden` with the prompt in place of the `length` rows from `start` on."""
        return self._put(self._vectors(hidden), self.take_out(hidden, start), start)

    def take_out(self, hidden: Tensor, start: Tensor) -> Tensor:
        """The inverse of `forward`."""
        column = torch.arange(hidden.shape[1] - len(self), device=hidden.device)
        return _columns(hidden, torch.where(column < start, column, column + len(self)))

    def _vectors(self, hidden: Tensor) -> Tensor:
        return self.weight.to(hidden.dtype).expand(len(hidden), -1, -1)

    def _put(self, own: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        """`rows` with `own` from column `start` on."""
        column = torch.arange(rows.shape[1] + len(self), device=rows.device)
        behind = torch.where(column < start + len(self), column - start, column)
        return _columns(torch.cat([own, rows], 1), torch.where(column < start, column + len(self), behind))


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """`values` [batch, columns, …] in the order of `index` [batch, columns]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


class _Standing:
    """Notes `prompt` as one in the input of `reader`, after the input's own first row or in front, until `remove`."""

    def __init__(self, reader: nn.Module, prompt: Prompt) -> None:
        self.reader, self.prompt = reader, prompt
        if _STANDING not in vars(reader):
            setattr(reader, _STANDING, [])
        standing = vars(reader)[_STANDING]
        in_front = sum(len(other) for other in standing if not other.behind_first)
        prompt.place = 1 + in_front if prompt.behind_first else 0
        standing.append(prompt)

    def remove(self) -> None:
        standing = vars(self.reader)[_STANDING]
        standing[:] = [prompt for prompt in standing if prompt is not self.prompt]
        if not standing:
            delattr(self.reader, _STANDING)


@dataclass(frozen=True, eq=False)
class _AtEmbeddings(Insertion):
    """Put a `Prompt` into the output of the embedding module of `site`, and make room for it.

    `reader` is the stack of layers that embeds the input: the base model, or its encoder. Its input grows by
    placeholder tokens, so that the model itself extends positions, token types and masks, and the prompt replaces their
    embeddings. The rows of the prompt are taken out of the output of a base model, since heads count positions. They
    stay in that of an encoder, since the decoder attends to them too.
    """

    reader: nn.Module = field(kw_only=True)
    base: nn.Module = field(kw_only=True)
    # How many positions the model has.
    limit: int | None = field(kw_only=True)

    @property
    def prompt(self) -> Prompt:
        return cast(Prompt, self.module)

    def connect(self) -> list[Any]:
        handles = [
            _Standing(self.reader, self.prompt),
            self.reader.register_forward_pre_hook(self._make_room, with_kwargs=True),
            self.site.module.register_forward_hook(self._put),
            self.reader.register_forward_hook(self._end, always_call=True),
        ]
        if self.reader is self.base:
            # The prompt that entered last is taken out first.
            return [*handles, self.base.register_forward_hook(self._take_out, prepend=True)]
        return [*handles, self.base.register_forward_pre_hook(self._widen_mask, with_kwargs=True)]

    def _make_room(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = named(reader, args, kwargs)
        ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        read = embedded if ids is None else ids
        if read is None:
            # The model itself raises an error about the missing input.
            return None
        positions, mask = read.shape[1], arguments.get("attention_mask")
        self._check(arguments, positions)
        in_front = self._in_front(all_stand=mask is not None and mask.shape[1] != positions)
        start = self.prompt.start(read, mask, in_front)
        if ids is not None:
            arguments["input_ids"] = self.prompt.spread(ids, self._placeholder(), start)
            # Tells `_put` that the next embeddings are these.
            self._passing["ids"] = start
        else:
            arguments["inputs_embeds"] = self.prompt(embedded, embedded, start)
        if arguments.get("position_ids") is not None:
            first = start - 1 if self.prompt.behind_first else self.prompt.padding(read, mask, in_front)
            arguments["position_ids"] = self.prompt.positions(arguments["position_ids"], start, first)
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            row = arguments.get(name)
            if row is not None and row.shape[1] == positions:
                arguments[name] = self.prompt.spread(row.expand(len(read), -1), fill, start)
        if reader is self.base:
            self._passing["output"] = start
        return (), arguments

    def _in_front(self, *, all_stand: bool) -> int:
        """How many prompt vectors are in front of all padding: when this prompt enters, or when all have entered."""
        if self.reader is not self.base:
            # The prompts of an encoder come after the padding.
            return 0
        if not all_stand:
            return self.prompt.place - int(self.prompt.behind_first)
        return sum(len(prompt) for prompt in vars(self.reader)[_STANDING] if not prompt.behind_first)

    def _check(self, arguments: dict[str, Any], positions: int) -> None:
        length = len(self.prompt)
        if self.limit is not None and positions + length > self.limit:
            raise ArgumentError(
                f"input of {positions} positions is too long: with {length} prompt vectors this model takes "
                f"at most {self.limit - length}"
            )
        refuse_cache(arguments, "a prompt")
        mask = arguments.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", None) != 2:
            raise UnsupportedError("a prompt needs an attention_mask [batch, positions], or none")

    def _placeholder(self) -> int:
        """A token that the model does not take for padding."""
        config: Any = self.base.config
        padding = {self.site.module.padding_idx, config.pad_token_id}
        return next(token for token in range(3) if token not in padding)

    def _put(self, embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        start = self._passing.pop("ids", None)
        if start is None:
            # The embeddings are used for something else.
            return None
        standing = vars(self.reader)[_STANDING]
        place = self.prompt.place
        for later in standing[[prompt is self.prompt for prompt in standing].index(True) + 1 :]:
            place += len(later) if later.place <= place else 0
        return self.prompt.replace(output, start + (place - self.prompt.place))

    def _take_out(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        out = partial(self.prompt.take_out, start=self._passing.pop("output"))
        if isinstance(output, tuple):
            return (out(output[0]), *output[1:])
        output["last_hidden_state"] = out(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(out(states) for states in output["hidden_states"])
        return output

    def _end(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A pass that failed leaves nothing to the next one.
        self._passing.clear()

    def _widen_mask(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Widen the encoder's mask, which the decoder's cross-attention reads too."""
        arguments = named(base, args, kwargs)
        mask = arguments.get("attention_mask")
        if mask is not None:
            start = self.prompt.start(mask, mask, self._in_front(all_stand=False))
            arguments["attention_mask"] = self.prompt.spread(mask, 1, start)
        return (), arguments


@register
@dataclass(frozen=True)
class PromptTuning(Adapter):
    """[e₁; P; e₂ … e_n]: `length` learned vectors among the token embeddings (Lester et al. 2021, section 2).

    Parameters
    ----------
    length: rows of P; their width is that of the word embeddings (less than the hidden size in albert and electra).
    init: `"uniform"` (U(−0.5, 0.5), as in the paper), `"normal"` (N(0, 0.02²)) or `"vocabulary"` (the embeddings of
        tokens drawn from the whole vocabulary).
    position: `"front"`, as in the paper; `"behind-first"`, behind the first token that is no padding, so that pooling
        still reads [CLS]; or `"auto"`, which is `"behind-first"` in encoders and `"front"` elsewhere. With `"front"`
        in an encoder, a pooler inside the base model reads the first prompt vector, as it does in stock peft.

    On BERT-base with 10: 7,680 parameters. Positions, token types and the attention mask follow; hidden states
    come back without the prompt's rows, so that heads see the positions they know. In encoder-decoder models the
    prompt stands in the encoder's input alone, and the decoder attends to its states; there it comes behind padding on
    the left, which would otherwise count in relative positions. It changes the outputs from the start: there is no
    identity at initialisation, and no merging.

    Raises `ArgumentError` where `length` leaves no position for an input; when the model runs, `ArgumentError` for
    inputs longer than its positions less `length` (before it, in `train`, for such a `max_length`), and
    `UnsupportedError` for a filled decoder cache and for masks that are not [batch, positions].
    """

    length: int = whole(10)
    init: str = one_of("uniform", INITS)
    position: str = one_of("auto", POSITIONS)

    def declare(self, sites: Sites) -> Iterator[Declared]:
        base: Any = sites.base
        config = sites.model.config
        reader = base.encoder if config.is_encoder_decoder else base
        embeddings: nn.Module = reader.get_input_embeddings()
        place = int(self.stands_behind_first(sites))
        prompt = Prompt(self._vectors(embeddings), place, behind_padding=config.is_encoder_decoder)
        path = next(name for name, module in sites.model.named_modules() if module is embeddings)
        site = Site("prompt", None, path, embeddings, "output")
        yield _AtEmbeddings(site, prompt, reader=reader, base=base, limit=position_limit(sites.model))

    def stands_behind_first(self, sites: Sites) -> bool:
        """Whether the prompt goes behind the first token of the input in this model."""
        if self.position != "auto":
            return self.position == "behind-first"
        return not sites.model.config.is_encoder_decoder and not is_causal(sites)

    def _vectors(self, embeddings: Any) -> Tensor:
        tokens, width = embeddings.weight.shape
        if self.init == "uniform":
            return torch.rand(self.length, width) - 0.5
        if self.init == "normal":
            return torch.randn(self.length, width) * 0.02
        # The embeddings are called, since some models scale the rows of the table.
        with torch.no_grad():
            drawn = torch.randint(tokens, (self.length,))
            vectors: Tensor = embeddings(drawn.to(embeddings.weight.device))
            return vectors.float().to(drawn.device)


def is_causal(sites: Sites) -> bool:
    """Whether no position reads a later one."""
    return bool(getattr(attention_of(sites, 0)[1], "is_causal", False))
