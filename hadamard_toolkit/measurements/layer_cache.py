"""What a model says with its adapter at work in some layers only, without computing what stayed the same.

Layer i reads nothing but what the layers before it made. So when the parts of an adapter from layer i on are
switched, evaluation starts at layer i from remembered hidden states: `LayerCache` keeps them by what was at work below.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

GIB = 2**30
BEGUN = 8  # passes that are kept half way
TOLERANCE = 1e-6  # between resuming and computing all of it, relative to the largest logit

_Key = tuple[int, frozenset[LayerSite]]
"""A layer, and what is at work below it: by these it is known what the layer reads, batch by batch."""


class LayerCache:
    """Logits of `inputs` with the adapter of `attachment` at work in any layers, the head always as trained.

    Parameters
    ----------
    inputs: what the model reads, `{"input_ids": [rows, length], "attention_mask": …}`. Rows are put into batches of
        like length, and padding behind the longest row of a batch is cut off.
    memory: bytes of hidden states that are kept, the least recently used ones go first; half of it at most is for those
        that `prepare` made. Too little only costs time. The few passes that were begun and left hold theirs besides.
    first: rows that are computed before the others, so that `logits(kept, first=True)` tells early how these fare.

    `logits(kept)` equals a pass over the model with all other parts taken off, to 1e-6. The weights of the attachment
    must not change meanwhile; after they did, call `clear()`. The model is left as it was found, also on error. What
    reads padding (UniPELT's gates as first published) depends on the batches here as in every evaluation.

    Attributes: `places` (the layers and sites that carry something), `resumes` (None before the first call; False where
    the layers of this architecture cannot be entered half way: every call then computes all of it), `narrows` (whether
    the head reads the first token alone, so that the last layer's feed-forward block is spared the others). Both are
    found out by comparing logits.
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
        self._prepared: dict[_Key, list[Tensor]] = {}  # of these nothing is forgotten
        self._widths: dict[int, int] = {}  # layer -> length of the tuple that it returns; absent: a tensor
        self._begun: OrderedDict[frozenset[LayerSite], _Pass] = OrderedDict()
        self.resumes: bool | None = None
        self.narrows = False

    def __len__(self) -> int:
        return len(self._order)

    def logits(self, kept: Collection[int | LayerSite], *, first: bool = False) -> np.ndarray:
        """Logits [rows, outputs] (float32) with the adapter at work in `kept` alone: layers, or `(layer, site)` pairs.

        With `first` only those of the rows named so, in their order; what was computed for them is not done again.
        Raises `ArgumentError` for a layer or site that there is not, `UnsupportedError` for a model without logits
        per row.
        """
        chosen = chosen_sites(self.attachment, kept)
        for found in self.steps(kept):
            if found is not None:
                return found[self._first] if first else found
            if first and len(answers := self._begun[chosen].answers) >= self._early:
                stands = np.argsort(self._order)[self._first]
                return np.asarray(torch.cat(answers[: self._early]).float().cpu().numpy()[stands])
        raise AssertionError("steps end with logits")

    def steps(self, kept: Collection[int | LayerSite]) -> Iterator[np.ndarray | None]:
        """The same, a batch at a time: None after each batch, in the end what `logits` returns.

        Between two steps the model is as it was found, and other questions may be asked. What was begun and left is
        gone on with when it is asked for again.
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
        while len(work.answers) < len(self._batches):
            self._step(work, chosen)
            yield None
        if self._begun.get(chosen) is work:  # neither cleared meanwhile nor finished by another question
            del self._begun[chosen]
            for layer in work.read[0]:
                self._remember((layer, _below(chosen, layer)), [read[layer] for read in work.read])
        found = torch.cat(work.answers).float().cpu().numpy()
        result = np.empty_like(found)
        result[self._order] = found
        yield result

    def prepare(self, kept: Collection[int | LayerSite], depth: int) -> Iterator[None]:
        """Compute what the layers up to `depth` read with `kept` at work, a batch at a time, and never forget it.

        This costs the layers below `depth` alone. Afterwards, whatever is at work from there on, `logits` starts at
        `depth`. Nothing is done where layers cannot be entered half way, or where half of the memory is used up.
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
            for layer in work.read[0]:
                self._remember((layer, _below(chosen, layer)), [read[layer] for read in work.read])
        for layer in range(1, stop + 1):
            key = (layer, _below(chosen, layer))
            if key in self._states and self._fits(_size(self._states[key])):
                self._prepared[key] = self._states.pop(key)

    def clear(self) -> None:
        """Forget all hidden states, and what was found out about the head."""
        self._states.clear()
        self._prepared.clear()
        self._begun.clear()
        self.resumes, self.narrows = None, False

    # ------------------------------------------------------------------------------------------------------------

    def _deepest(self, chosen: frozenset[LayerSite], most: int) -> tuple[int, list[Tensor] | None]:
        """The highest layer up to `most` whose input is known, and that input; layer 0 and None if none is."""
        for layer in range(most, 0, -1):
            key = (layer, _below(chosen, layer))
            if key in self._prepared:
                return layer, self._prepared[key]
            if key in self._states:
                self._states.move_to_end(key)
                return layer, self._states[key]
        return 0, None

    def _remember(self, key: _Key, states: list[Tensor]) -> None:
        if key in self._prepared:
            return
        self._states[key] = states
        self._states.move_to_end(key)
        most = self.memory - sum(map(_size, self._prepared.values()))
        while self._states and sum(map(_size, self._states.values())) > most:
            self._states.popitem(last=False)

    def _fits(self, more: int) -> bool:
        return sum(map(_size, self._prepared.values())) + more <= self.memory // 2

    def _step(self, work: _Pass, chosen: frozenset[LayerSite], stop: int | None = None) -> None:
        """The next batch of `work`."""
        number = len(work.answers)
        with _as_found(self.attachment.model), only(self.attachment, chosen), torch.inference_mode():
            state = work.states[number] if work.states else None
            answer, read = self._pass(self._batches[number], work.start, state, stop)
        work.answers.append(answer)
        work.read.append(read if self.resumes else {})

    def _pass(
        self, batch: Batch, start: int, state: Tensor | None, stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits of one batch, computed from layer `start` on, and what each later layer read.

        With `stop`, the layers from there on hand over what they read: then the logits mean nothing.
        """
        read: dict[int, Tensor] = {}
        device = next(self.attachment.model.parameters()).device
        stop = len(self._layers) if stop is None else stop
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                if start < index <= stop:
                    stack.enter_context(
                        _hook(layer.register_forward_pre_hook, _note(read, index), with_kwargs=True)
                    )
                if start <= index < stop:
                    stack.enter_context(_hook(layer.register_forward_hook, self._note_form(index)))
                else:
                    handed = state if index < start else None
                    stack.enter_context(_standing_in(layer, self._hand_over(index, handed)))
            if self.narrows:
                norm = self.attachment.sites(len(self._layers) - 1, "attention_norm").module
                stack.enter_context(_hook(norm.register_forward_pre_hook, _first_token))
            output = self.attachment.model(**{name: value.to(device) for name, value in batch.items()})
        answer = getattr(output, "logits", None)
        if answer is None or answer.ndim != 2:
            raise UnsupportedError(
                f"{type(self.attachment.model).__name__} gives no logits per row, so layers cannot be compared by "
                "them; classification and regression heads do"
            )
        return answer, read

    def _hand_over(self, index: int, state: Tensor | None) -> Callable[..., Any]:
        """The forward of a layer that is passed over: it returns `state` (None: what it reads) as the layer would."""
        width = self._widths.get(index)

        def forward(*args: Any, **options: Any) -> Any:
            handed = _read_by(args, options) if state is None else state
            return handed if width is None else (handed, *[None] * (width - 1))

        return forward

    def _note_form(self, index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._widths[index] = len(output)

        return note

    def _try_shortcuts(self) -> None:
        """Set `resumes` and `narrows` by what they do to the logits of the shortest rows, all parts being at work."""
        self.resumes = self.narrows = False
        if self.attachment.model.config.is_encoder_decoder:
            return  # two stacks of layers, and the second reads the first one's end in every layer
        batch = min(self._batches, key=lambda batch: sum(value.numel() for value in batch.values()))
        with _as_found(self.attachment.model), torch.inference_mode():
            whole, read = self._pass(batch, 0, None)

            def same(start: int) -> bool:
                try:
                    answer, _ = self._pass(batch, start, read.get(start))
                except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                    return False  # later layers want more of the earlier ones than their hidden states
                allowed = TOLERANCE * max(1.0, float(whole.abs().max()))
                return answer.shape == whole.shape and float((answer - whole).abs().max()) <= allowed

            later = range(1, len(self._layers))
            self.resumes = set(read) == set(later) and all(map(same, later))
            if self.attachment.sites.post_norm(len(self._layers) - 1) and batch["input_ids"].shape[1] > 1:
                self.narrows = True
                self.narrows = same(0)


@dataclass(frozen=True)
class _Pass:
    """A pass over all batches from layer `start` on, which reads `states`; as far as it has come."""

    start: int
    states: list[Tensor] | None
    answers: list[Tensor] = field(default_factory=list)
    read: list[dict[int, Tensor]] = field(default_factory=list)


def _below(chosen: frozenset[LayerSite], layer: int) -> frozenset[LayerSite]:
    return frozenset(place for place in chosen if place[0] < layer)


def _size(states: list[Tensor]) -> int:
    return sum(state.numel() * state.element_size() for state in states)


def _batches(
    inputs: Mapping[str, Tensor], batch_size: int, first: np.ndarray
) -> tuple[np.ndarray, list[Batch], int]:
    """The order of rows by length, those of `first` before all others, and the inputs in that order, cut into batches.

    Also how many of the batches hold the rows of `first`.
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
        # where the last token of a row stands: padding may be on either side, and only that on the right is cut off
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
    cut = [[part[at : at + batch_size] for at in range(0, len(part), batch_size)] for part in parts]
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


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode in the block; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own; hooks around it stay."""
    held = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if held is not None:
            module.forward = held


@contextmanager
def _hook(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    handle = register(hook, **options)
    try:
        yield
    finally:
        handle.remove()


def _note(read: dict[int, Tensor], index: int) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        read[index] = _read_by(args, options)

    return note


def _read_by(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The hidden states among what a layer is called with."""
    hidden: Tensor = args[0] if args else options["hidden_states"]
    return hidden


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Only the first token of what a norm reads, [batch, length, hidden]."""
    return (args[0][:, :1], *args[1:])
