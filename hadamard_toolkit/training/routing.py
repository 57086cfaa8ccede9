"""`route`: one batch over several trained adapters, each row through the one that it names.

All adapters share the frozen backbone. Their parameters are stacked, each row takes its own by index, and
`torch.func.vmap` makes one forward pass of it, whatever the method is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.files import read_state
from hadamard_toolkit.adapters.gates import Gate
from hadamard_toolkit.adapters.loading import load_attachment
from hadamard_toolkit.errors import ArgumentError, UnsupportedError, check_choice
from hadamard_toolkit.training.bank_state import Forward, Stacked


class Router:
    """Several trained adapters and their heads on one backbone; `route` makes it.

    `outputs` is the size of each adapter's head by the adapter's name.
    """

    def __init__(self, attachment: Attachment, stacked: Stacked, outputs: Mapping[str, int]) -> None:
        self.outputs = dict(outputs)
        self._attachment, self._stacked = attachment, stacked
        self._index = {name: index for index, name in enumerate(self.outputs)}
        self._sizes = torch.tensor(list(self.outputs.values()))
        parameters = attachment.named_parameters()
        self._forward = Forward(attachment.model, {name: parameters[name] for name in stacked})

    @torch.no_grad()
    def __call__(self, names: Sequence[str], **inputs: Tensor) -> Tensor:
        """Logits [rows, largest head]; row i goes through the adapter `names[i]` and its head.

        `inputs` are those of the model, each [rows, …], as a tokenizer returns them. A head with fewer outputs than the
        largest one is filled up with -inf, which neither argmax nor softmax sees. The model runs in evaluation mode.
        Raises `ArgumentError` for an unknown name, and for another number of names than rows.
        """
        for name in dict.fromkeys(names):
            check_choice("names", name, self.outputs)
        rows = sorted({len(value) for value in inputs.values()})
        if rows != [len(names)]:
            raise ArgumentError(
                f"names has {len(names)} entries and the inputs have {rows} rows; give one name per row"
            )
        self._attachment.model.eval()
        device = next(iter(self._stacked.values())).device
        chosen = torch.tensor([self._index[name] for name in names])
        values = {name: value[chosen.to(device)] for name, value in self._stacked.items()}
        # To the forward pass each row is a run of its own with a batch of one.
        logits = self._forward(values, {name: value.to(device)[:, None] for name, value in inputs.items()})[
            :, 0
        ]
        beyond = torch.arange(logits.shape[1]) >= self._sizes[chosen][:, None]
        return logits.masked_fill(beyond.to(device), -torch.inf)

    def detach(self) -> None:
        """Give the model back as it was before `route`."""
        self._attachment.detach()


def route(model: PreTrainedModel, adapters: Mapping[str, str | Path]) -> Router:
    """Several saved adapters on `model` at once, for batches in which every row names the adapter that it wants.

    `adapters` maps names to folders that `Attachment.save` wrote. They hold the same adapter (class, sizes, layers) on
    the same backbone; their heads may differ in the number of outputs. No loop runs over adapters, so the time of a
    batch does not grow with their number. Every row takes a copy of its adapter's parameters for the pass.

    >>> router = ht.route(model, {"sst2": "adapters/sst2", "mrpc": "adapters/mrpc"})
    >>> logits = router(["sst2", "mrpc"], **tokenizer(texts, padding=True, return_tensors="pt"))

    Raises `ArgumentError` for adapters or heads that do not fit together, and `UnsupportedError` for encoder-decoders
    and for `gated="original"`, where a row's result would depend on the others. The model is then as it was.
    """
    if not adapters:
        raise ArgumentError("adapters={} is not allowed; give at least one name and its folder")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} looks for end tokens in a way that a pass over single rows cannot"
        )
    states: dict[str, Stacked] = {}
    first: Adapter | None = None
    for name, folder in adapters.items():
        adapter, states[name] = _read(model, folder)
        first = first or adapter
        if adapter != first:
            raise ArgumentError(
                f"adapters[{name!r}] is {adapter} and the first one {first}; all must be the same"
            )
    stacked = _stack(states)
    attachment = load_attachment(model, folder, head=False)
    return Router(attachment, stacked, {name: _outputs(state) for name, state in states.items()})


def _read(model: PreTrainedModel, folder: str | Path) -> tuple[Adapter, Stacked]:
    """The adapter in `folder`, and its parameters and head as they are on `model`, which stays as it was."""
    attachment = load_attachment(model, folder, head=False)
    try:
        if any(isinstance(module, Gate) and module.mode == "original" for module in model.modules()):
            raise UnsupportedError(
                "gated='original' averages over padding, so a row would depend on the longest one"
            )
        state = {name: value.detach().clone() for name, value in attachment.named_parameters().items()}
        heads = {name: value for name, value in read_state(folder).items() if name.startswith("head.")}
        return attachment.adapter, state | {name: value.to(model.device) for name, value in heads.items()}
    finally:
        attachment.detach()


def _outputs(state: Stacked) -> int:
    """The size of a head: the rows of its last tensor."""
    return len(state[[name for name in state if name.startswith("head.")][-1]])


def _stack(states: Mapping[str, Stacked]) -> Stacked:
    """Parameters of all adapters [adapters, …] by name; the last tensors of heads are filled up with zeros."""
    stacked = {}
    for name, value in next(iter(states.values())).items():
        values = {adapter: state[name] for adapter, state in states.items()}
        if any(other.shape[1:] != value.shape[1:] for other in values.values()):
            shapes = {adapter: tuple(other.shape) for adapter, other in values.items()}
            raise ArgumentError(f"the adapters do not fit together: {name} has shapes {shapes}")
        rows = max(len(other) for other in values.values())
        stacked[name] = torch.stack(
            [
                functional.pad(other, (0, 0) * (other.ndim - 1) + (0, rows - len(other)))
                for other in values.values()
            ]
        )
    return stacked
