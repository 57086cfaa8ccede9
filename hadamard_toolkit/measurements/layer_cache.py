"""Logits of a model with its adapter active in some layers only, without recomputing the layers that did not change.

The input of layer i depends only on the layers below it. When the adapter is switched on or off from layer i upwards,
evaluation can start at layer i from cached hidden states. `LayerCache` stores them by the sites that are active below.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.parts import LayerSite, chosen_sites, only, parts_of
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError, check_range
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.skipping import Forms, evaluating, replaced_forward

GIB = 2**30
BEGUN = 8  # unfinished passes that are kept
TOLERANCE = 1e-6  # largest difference between a resumed and a full pass, relative to the largest logit

_Key = tuple[int, frozenset[LayerSite]]
"""A layer and the active sites below it; together they determine the input of the layer."""


class LayerCache:
    """Logits of `inputs` with the adapter of `attachment` active in any subset of layers and with the trained head.

    Parameters
    ----------
    inputs: inputs of the model, `{"input_ids": [rows, length], "attention_mask": …}`. Rows of similar length share a
        batch, and each batch is cut after its longest row.
    memory: bytes of hidden states to keep. The least recently used are dropped first; at most half of it is used by
        `prepare`. Less memory only costs time. Up to 8 unfinished passes hold their states in addition.
    first: rows that are computed before the others, for early results by `logits(kept, first=True)`.

    `logits(kept)` equals a pass over the model without all other parts of the adapter, to 1e-6. Call `clear()` after
    the weights of the attachment have changed. The model is left unchanged, also after an error. Modules that read
    padding (UniPELT's gates as first published) depend on how rows are batched, as in every evaluation.

    Attributes
    ----------
    places: the layers and sites with a part of the adapter.
    resumes: whether evaluation can start at a later layer in this architecture; if not, every call computes all layers.
        None before the first call, which compares logits to find out.
    narrows: whether the head reads only the first token, so that the last layer's feed-forward block can skip the
        others; found out likewise.
    """

    def __init__(
        self,
        attachment: Attachment,
        inputs: Mapping[str, Tensor],
        *,
        batch_size: int = 64,
        memory: int = GIB,
        first: Sequence[int] | np.ndarray = (),
    ) -> None:
        check_range("batch_size", batch_size, least=1)
        check_range("memory", memory, least=0)
        self.attachment, self.memory = attachment, memory
        self.places: tuple[LayerSite, ...] = tuple(parts_of(attachment))
        self._layers = [attachment.sites.layer(index)[1] for index in range(len(attachment.sites))]
        self._first = np.asarray(first, dtype=int)
        self._order, self._batches, self._early = _batches(inputs, batch_size, self._first)
        self._states: OrderedDict[_Key, list[Tensor]] = OrderedDict()
        self._prepared: dict[_Key, list[Tensor]] = {}  # never dropped
        self._forms = Forms()
        self._begun: OrderedDict[frozenset[LayerSite], _Pass] = OrderedDict()
        self.resumes: bool | None = None
        self.narrows = False

    def __len__(self) -> int:
        return len(self._order)

    def logits(self, kept: Collection[int | LayerSite], *, first: bool = False) -> np.ndarray:
        """Logits [rows, outputs] (float32) with the adapter active only in `kept`: layers, or `(layer, site)` pairs.

        With `first`, only the logits of the rows `first`, in their order; a later call for all rows reuses them. Raises
        `ArgumentError` for an unknown layer or site, `UnsupportedError` for a model without logits per row.
        """
        chosen = chosen_sites(self.attachment, kept)
        for logits in self.steps(kept):
            if logits is not None:
                return logits[self._first] if first else logits
            if first and len(batches := self._begun[chosen].logits) >= self._early:
                position = np.argsort(self._order)[self._first]
                return np.asarray(torch.cat(batches[: self._early]).float().cpu().numpy()[position])
        raise AssertionError("steps end with logits")

    def steps(self, kept: Collection[int | LayerSite]) -> Iterator[np.ndarray | None]:
        """The same as `logits`, one batch at a time: yields None after each batch, and the logits at the end.

        Between two steps the model is unchanged, and the cache may be used for other layers. An unfinished pass is
        resumed the next time its layers are requested.
        """
        chosen = chosen_sites(self.attachment, kept)
        if self.resumes is None:
            self._try_shortcuts()
        if chosen not in self._begun:
            self._begun[chosen] = _Pass(*self._deepest(chosen, len(self._layers) - 1))
        self._begun.move_to_end(chosen)
        while len(self._begun) > BEGUN:
            self._begun.popitem(last=False)
        work = self._begun[chosen]
        while len(work.logits) < len(self._batches):
            self._step(work, chosen)
            yield None
        if self._begun.get(chosen) is work:  # neither cleared nor finished by another call meanwhile
            del self._begun[chosen]
            self._remember(work, chosen)
        logits = torch.cat(work.logits).float().cpu().numpy()
        result = np.empty_like(logits)
        result[self._order] = logits
        yield result

    def prepare(self, kept: Collection[int | LayerSite], depth: int) -> Iterator[None]:
        """Compute and keep the inputs of the layers up to `depth` with the adapter active in `kept`, batch by batch.

        Only the layers below `depth` are computed. Afterwards `logits` starts at `depth`, whatever is active from there
        on. Does nothing if evaluation cannot start at a later layer, or if half of the memory is used up.
        """
        chosen = chosen_sites(self.attachment, kept)
        if self.resumes is None:
            self._try_shortcuts()
        stop = min(depth, len(self._layers) - 1)
        start, states = self._deepest(chosen, stop)
        known = next(chain(self._prepared.values(), self._states.values()), [])
        if self.resumes and start < stop and self._fits(_size(known) * (stop - start)):
            work = _Pass(start, states)
            while len(work.read) < len(self._batches):
                self._step(work, chosen, stop)
                yield None
            self._remember(work, chosen)
        for layer in range(1, stop + 1):
            key = (layer, _below(chosen, layer))
            if key in self._states and self._fits(_size(self._states[key])):
                self._prepared[key] = self._states.pop(key)

    def clear(self) -> None:
        """Drop all hidden states, and what is known about the architecture."""
        self._states.clear()
        self._prepared.clear()
        self._begun.clear()
        self.resumes, self.narrows = None, False

    # ------------------------------------------------------------------------------------------------------------

    def _deepest(self, chosen: frozenset[LayerSite], most: int) -> tuple[int, list[Tensor] | None]:
        """The highest layer up to `most` whose input is cached, and that input; layer 0 and None if there is none."""
        for layer in range(most, 0, -1):
            key = (layer, _below(chosen, layer))
            if key in self._prepared:
                return layer, self._prepared[key]
            if key in self._states:
                self._states.move_to_end(key)
                return layer, self._states[key]
        return 0, None

    def _remember(self, work: _Pass, chosen: frozenset[LayerSite]) -> None:
        """Cache the layer inputs of a finished pass, within the memory that is left."""
        most = self.memory - sum(map(_size, self._prepared.values()))
        for layer in work.read[0]:
            key = (layer, _below(chosen, layer))
            if key not in self._prepared:
                self._states[key] = [read[layer] for read in work.read]
                self._states.move_to_end(key)
            while self._states and sum(map(_size, self._states.values())) > most:
                self._states.popitem(last=False)

    def _fits(self, more: int) -> bool:
        return sum(map(_size, self._prepared.values())) + more <= self.memory // 2

    def _step(self, work: _Pass, chosen: frozenset[LayerSite], stop: int | None = None) -> None:
        """Compute the next batch of `work`."""
        number = len(work.logits)
        with evaluating(self.attachment.model), only(self.attachment, chosen), torch.inference_mode():
            state = work.states[number] if work.states else None
            logits, read = self._pass(self._batches[number], work.start, state, stop)
        work.logits.append(logits)
        work.read.append(read if self.resumes else {})

    def _pass(
        self, batch: Batch, start: int, state: Tensor | None, stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits of one batch, computed from layer `start` on with the input `state`, and the inputs of later layers.

        With `stop`, the layers from there on return their input, and the logits are meaningless.
        """
        read: dict[int, Tensor] = {}
        device = next(self.attachment.model.parameters()).device
        stop = len(self._layers) if stop is None else stop
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                if start < index <= stop:
                    note = layer.register_forward_pre_hook(_note(read, index), with_kwargs=True)
                    stack.callback(note.remove)
                if start <= index < stop:
                    stack.callback(layer.register_forward_hook(self._forms.note(index)).remove)
                else:
                    skipped = self._skipped(index, state if index < start else None)
                    stack.enter_context(replaced_forward(layer, skipped))
            if self.narrows:
                norm = self.attachment.sites(len(self._layers) - 1, "attention_norm").module
                stack.callback(norm.register_forward_pre_hook(_first_token).remove)
            output = self.attachment.model(**{name: value.to(device) for name, value in batch.items()})
        logits = getattr(output, "logits", None)
        if logits is None or logits.ndim != 2:
            raise UnsupportedError(
                f"{type(self.attachment.model).__name__} gives no logits per row, so layers cannot be compared by "
                "them; classification and regression heads do"
            )
        return logits, read

    def _skipped(self, index: int, state: Tensor | None) -> Callable[..., Any]:
        """The forward of a skipped layer: returns `state` (None: its input) in the form that the layer returns."""

        def forward(*args: Any, **options: Any) -> Any:
            return self._forms.output(index, _hidden_states(args, options) if state is None else state)

        return forward

    def _try_shortcuts(self) -> None:
        """Set `resumes` and `narrows`, if they leave the logits of the smallest batch as they are."""
        self.resumes = self.narrows = False
        if self.attachment.model.config.is_encoder_decoder:
            return  # every layer of the decoder reads the last hidden states of the encoder
        batch = min(self._batches, key=lambda batch: sum(value.numel() for value in batch.values()))
        with evaluating(self.attachment.model), torch.inference_mode():
            whole, read = self._pass(batch, 0, None)

            def same(start: int) -> bool:
                try:
                    logits, _ = self._pass(batch, start, read.get(start))
                except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                    return False  # later layers need more of the earlier ones than their hidden states
                allowed = TOLERANCE * max(1.0, float(whole.abs().max()))
                return logits.shape == whole.shape and float((logits - whole).abs().max()) <= allowed

            later = range(1, len(self._layers))
            self.resumes = set(read) == set(later) and all(map(same, later))
            if self.attachment.sites.post_norm(len(self._layers) - 1) and batch["input_ids"].shape[1] > 1:
                self.narrows = True
                self.narrows = same(0)


@dataclass(frozen=True)
class _Pass:
    """An unfinished pass over all batches: starts at layer `start` with the inputs `states`, one per batch.

    logits, and read (the inputs of later layers): of the batches that are done.
    """

    start: int
    states: list[Tensor] | None
    logits: list[Tensor] = field(default_factory=list)
    read: list[dict[int, Tensor]] = field(default_factory=list)


def _below(chosen: frozenset[LayerSite], layer: int) -> frozenset[LayerSite]:
    return frozenset(place for place in chosen if place[0] < layer)


def _size(states: list[Tensor]) -> int:
    return sum(state.numel() * state.element_size() for state in states)


def _batches(
    inputs: Mapping[str, Tensor], batch_size: int, first: np.ndarray
) -> tuple[np.ndarray, list[Batch], int]:
    """Cut rows into batches of similar length, those of `first` before all others.

    Returns the order of the rows, the batches, and how many of the batches hold the rows of `first`.
    """
    sizes = {name: len(value) for name, value in inputs.items()}
    if not sizes or min(sizes.values()) < 1 or len(set(sizes.values())) > 1:
        raise DataError(
            f"inputs have {sizes or 'no tensors'}; every tensor needs the same number of rows, at least one"
        )
    rows = next(iter(sizes.values()))
    mask = inputs.get("attention_mask")
    ends = None
    if mask is not None:
        # the end of the last token of each row: padding may be on either side, and is only cut off on the right
        ends = (mask != 0).long().mul(torch.arange(1, mask.shape[1] + 1)).amax(1)
    if len(np.intersect1d(first, np.arange(rows))) < len(first):
        raise ArgumentError(
            f"first={first.tolist()} is not allowed; name rows from 0 to {rows - 1}, none of them twice"
        )
    later = np.setdiff1d(np.arange(rows), first)
    parts = [
        part if ends is None else part[np.argsort(ends[part].numpy(), kind="stable")]
        for part in (first, later)
    ]
    cut = [[part[start : start + batch_size] for start in range(0, len(part), batch_size)] for part in parts]
    batches = []
    for chosen in map(torch.from_numpy, [*cut[0], *cut[1]]):
        batch = {name: value[chosen] for name, value in inputs.items()}
        if ends is not None and mask is not None:
            end = max(1, int(ends[chosen].max()))
            batch = {
                name: value[:, :end] if value.ndim == 2 and value.shape == mask[chosen].shape else value
                for name, value in batch.items()
            }
        batches.append(batch)
    return np.concatenate(parts), batches, len(cut[0])


def _note(read: dict[int, Tensor], index: int) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        read[index] = _hidden_states(args, options)

    return note


def _hidden_states(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    hidden: Tensor = args[0] if args else options["hidden_states"]
    return hidden


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut the input of a norm [batch, length, hidden] to its first token."""
    return (args[0][:, :1], *args[1:])
