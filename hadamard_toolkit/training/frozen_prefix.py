"""The frozen prefix: hidden states below the lowest trained layer, computed once per text.

What the layers below the lowest part of an adapter give for a text never changes while the adapter trains. With
`Protocol(frozen_prefix="cached")` they run once per text in evaluation mode. A batch then brings their hidden states
along, and the model's own forward starts in effect at the lowest trained layer, whatever its architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hadamard_toolkit.adapters.gates import reads_padding
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.batching import Examples, SortedBatches, Source
from hadamard_toolkit.training.data import Data
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.feature_store import GIB, FeatureStore
from hadamard_toolkit.training.features import backbone_digest, probe_rows
from hadamard_toolkit.training.skipping import Forms, evaluating, replaced_forward
from hadamard_toolkit.training.stages import TrainingState

# A part of every key; raise it when the meaning of stored hidden states changes.
FORMAT = 1
# The argument that brings hidden states [rows, tokens, width] to the model, which never sees it.
STATES = "prefix_states"
# The largest difference allowed between logits with and without cached states: relative to how much logits differ
# between rows, or, for rounding, to their size.
OF_SPREAD, OF_SIZE = 1e-3, 1e-5
REFUSED = "frozen_prefix='cached' is not possible"


class FrozenPrefix:
    """The rows of a run as text with the hidden states of the first `depth` layers, inside `running`.

    `depth` is the lowest layer that anything reaches which trains now: it is 0 with prompts or trained embeddings, and
    the number of layers where the head alone trains.

    The states of a split are computed, or taken from `store`, when its rows are first asked for. They are kept by
    batches of rows of similar length, under a key that covers the backbone's weights and config, the token ids of
    these rows, `depth`, precision and kind of device. Each process of several computes its own.

    With a `depth` of 0 nothing is cached: everything trains as with `frozen_prefix="computed"`.

    Raises `UnsupportedError` where a pass cannot start from cached hidden states: later layers read more of the earlier
    ones (T5's position bias), or something reads padding (heads for spans, `gated="original"`); and where the states
    fit neither into memory nor on disk.
    """

    def __init__(self, state: TrainingState, data: Data, store: FeatureStore) -> None:
        self.state, self.data, self.store, self.parts = state, data, store, data.parts
        attachment = state.attachment
        self._layers = [attachment.sites.layer(index)[1] for index in range(len(attachment.sites))]
        self._forms = Forms()
        self._brought: Tensor | None = None  # the hidden states of the current batch
        self._by_split: dict[str, list[Tensor]] = {}
        with state.timed("features"):
            _, examples = data.pool(self.parts["train"].split)
            rows = probe_rows(examples)
            batch = self._batch(examples, rows)
            self.depth, output = self._find_depth(batch)
            del self._layers[self.depth :]
            if not self.depth:
                return
            if not state.kind.cacheable or reads_padding(attachment.model):
                reader = "gated='original'" if state.kind.cacheable else f"a head for {data.task.kind} tasks"
                raise UnsupportedError(f"{REFUSED}: {reader} reads padding, whose hidden states are not kept")
            with attachment.enabled(False):
                backbone = backbone_digest(attachment.model)
            device, precision = state.accelerator.device.type, state.protocol.precision
            self._about = [FORMAT, backbone, self.depth, precision, device]
            states = self._compute(examples, rows)
            self._check(batch, states, output.logits.detach())
            self.on_disk = self._check_size(states[0])

    def source(self, name: str) -> Source:
        """Part `name` as batches."""
        source = self.data.source(name)
        if not self.depth:
            return source
        of_split = self._states(self.parts[name].split)
        states = [of_split[position] for position in self.data.positions(name)]

        def collate(rows: Any) -> Batch:
            brought = pad_sequence([states[row["row"]] for row in rows], batch_first=True)
            return {**source.collate(rows), STATES: brought}

        return Source(source.rows, collate)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, the layers below `depth` are skipped for batches that bring their hidden states along."""
        with ExitStack() as stack:
            if self.depth:
                model = self.state.attachment.model
                handle = model.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            for index, layer in enumerate(self._layers):
                stack.enter_context(replaced_forward(layer, self._skipped(index, layer.forward)))
            yield

    def _take(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._brought = options.pop(STATES, None)
        return args, options

    def _skipped(self, index: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer of the prefix, which gives what the batch brought in the form of that layer."""

        def forward(*args: Any, **options: Any) -> Any:
            if self._brought is None:
                return compute(*args, **options)
            return self._forms.output(index, self._brought)

        return forward

    def _states(self, split: str) -> list[Tensor]:
        """The hidden states [tokens, width] of every row in the pool of `split`."""
        if split not in self._by_split:
            _, examples = self.data.pool(split)
            states: list[Any] = [None] * len(examples)
            with self.state.timed("features"):
                for rows in SortedBatches(examples.lengths, self.state.protocol.eval_batch_size):
                    block = self._block(examples.select(rows))
                    for row, of_row in zip(rows, block, strict=True):
                        states[row] = of_row
            self._by_split[split] = states
        return self._by_split[split]

    def _block(self, examples: Examples) -> tuple[Tensor, ...]:
        """The hidden states of a batch of rows, from the store or computed."""
        key = hashlib.sha256(json.dumps([*self._about, examples.digest()]).encode()).hexdigest()
        states = self.store.get_states(key)
        if states is None:
            states = torch.cat(self._compute(examples, range(len(examples))))
            states = self.store.put_states(key, states, on_disk=self.on_disk)
        return states.split(examples.lengths)

    def _compute(self, examples: Examples, rows: Any) -> list[Tensor]:
        """The hidden states of these rows after the last layer of the prefix, on the CPU."""
        noted: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            noted.append(output[0] if isinstance(output, tuple) else output)
            raise _Enough

        handle = self._layers[-1].register_forward_hook(note)
        try:
            with suppress(_Enough):
                self._output(self._batch(examples, rows))
        finally:
            handle.remove()
        lengths = examples.lengths
        return [of_row[: lengths[row]].cpu() for row, of_row in zip(rows, noted[0], strict=True)]

    def _batch(self, examples: Examples, rows: Any) -> Batch:
        batch = self.state.kind.collate(examples.__getitems__(rows))
        return {name: value.to(self.state.accelerator.device) for name, value in batch.items()}

    def _output(self, batch: Batch) -> Any:
        """What the model gives in evaluation mode."""
        model = self.state.attachment.model
        with evaluating(model), self.state.accelerator.autocast():
            return model(**inputs_of(batch))

    def _find_depth(self, batch: Batch) -> tuple[int, Any]:
        """How many layers no trained parameter reaches, as autograd sees it, and the model's output for `batch`."""
        reached = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            reached.append((output[0] if isinstance(output, tuple) else output).requires_grad)

        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(note).remove)
                stack.callback(layer.register_forward_hook(self._forms.note(index)).remove)
            output = self._output(batch)
        return [*reached, True].index(True), output

    def _check(self, batch: Batch, states: list[Tensor], logits: Tensor) -> None:
        """The logits of a few rows of all lengths must be the same from cached states."""
        brought = pad_sequence(states, batch_first=True).to(logits.device)
        with self.running(), torch.no_grad():
            gap = float((self._output({**batch, STATES: brought}).logits - logits).abs().max())
        spread = float((logits.amax(0) - logits.amin(0)).max())
        if not gap <= max(OF_SPREAD * spread, OF_SIZE * float(logits.abs().max())):
            model = type(self.state.attachment.model).__name__
            raise UnsupportedError(
                f"{REFUSED}: {model} cannot go on from the hidden states of layer {self.depth - 1} (its logits differ "
                f"by {gap:.1e}), since later layers read more of the earlier ones"
            )

    def _check_size(self, states: Tensor) -> bool:
        """Whether the hidden states of all rows of the run, which are like `states`, lie on disk."""
        pools = [self.data.pool(split)[1] for split in {part.split for part in self.parts.values()}]
        tokens = sum(sum(examples.lengths) for examples in pools)
        size = tokens * states.shape[1] * states.element_size()
        if size <= self.store.memory:
            return False
        disk = self.store.disk if self.store.folder else 0
        if size > disk:
            raise UnsupportedError(
                f"{REFUSED}: the hidden states of {tokens:,} tokens take {size / GIB:.2g} GiB, and the feature store "
                f"has {self.store.memory / GIB:.2g} GiB of memory and {disk / GIB:.2g} GiB of disk for them; use fewer "
                "rows, or give train() a FeatureStore with more"
            )
        return True


class _Enough(Exception):
    """Ends a forward pass whose later layers are not needed."""
