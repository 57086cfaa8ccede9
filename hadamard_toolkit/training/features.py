"""Frozen features: what the task head reads, computed once per backbone and text.

While only the head trains, the backbone's output for a row never changes. It is computed once in evaluation mode
with the adapter off, and the model's own forward then runs with a stub in place of the backbone, so that every
architecture's own head (dropout, dense layers, activation, loss) is used unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, Seq2SeqModelOutput

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.backbones import NOT_THE_BACKBONE
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.batching import Examples, Source
from hadamard_toolkit.training.evaluation import collect, everywhere, inputs_of
from hadamard_toolkit.training.feature_store import FeatureStore

# A part of every key; raise it when the meaning of a stored tensor changes. Since 2, rows are padded on the right
# whatever side the tokenizer prefers.
FORMAT = 2
PROBE_ROWS = 8
# The largest difference allowed between logits from the backbone and from its features: relative to how much logits
# differ between rows, or, for rounding, to their size.
OF_SPREAD, OF_SIZE = 1e-2, 1e-5
Reading = Callable[[Any, Batch, Any], Tensor | None]


def _last_token(output: Any, ids: Tensor, token: object, *, equal: bool) -> Tensor | None:
    """The last position of each row whose id is `token`, or is not."""
    if not isinstance(token, int):
        return None
    positions = torch.arange(ids.shape[1], device=ids.device) * ((ids == token) == equal)
    return output[0][torch.arange(len(ids), device=ids.device), positions.argmax(-1)]


def _mean(output: Any, batch: Batch, config: Any) -> Tensor | None:
    if "attention_mask" not in batch:
        return None
    mask = batch["attention_mask"].unsqueeze(-1)
    return (output[0] * mask).sum(1) / mask.sum(1)


# What a head may read of a backbone's output, tried in this order. Each gives [rows, width], or None.
READINGS: dict[str, Reading] = {
    "pooler output": lambda output, batch, config: getattr(output, "pooler_output", None),
    "first token": lambda output, batch, config: output[0][:, 0],
    "end-of-sequence token": lambda output, batch, config: _last_token(
        output, batch["input_ids"], config.eos_token_id, equal=True
    ),
    "last token": lambda output, batch, config: _last_token(
        output, batch["input_ids"], config.pad_token_id, equal=False
    ),
    "mean of tokens": _mean,
}


class _Stub(nn.Module):
    """Stands in for the backbone and returns `inputs_embeds` [rows, 1, width] as its output."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        if self.config.is_encoder_decoder:
            return Seq2SeqModelOutput(last_hidden_state=inputs_embeds)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0]
        )


@contextmanager
def without_backbone(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block `model` is its head alone, which reads batches of `FeatureRows`."""
    name, base = model.base_model_prefix, model.base_model
    if base is model:
        raise UnsupportedError(f"{type(model).__name__} has no head apart from its base model")
    stub = _Stub(model.config).train(base.training)
    setattr(model, name, stub)
    try:
        yield
    finally:
        base.train(stub.training)
        setattr(model, name, base)


@dataclass(frozen=True)
class FeatureRows:
    """Cached features as rows for a `Source`: `vectors` [rows, width], `labels` [rows], and one token per row."""

    vectors: Tensor
    labels: np.ndarray
    token: int

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        order = torch.as_tensor(rows)
        return {
            "row": order,
            "labels": torch.from_numpy(self.labels[order.numpy()]),
            "inputs_embeds": self.vectors[order].unsqueeze(1),
            "input_ids": torch.full((len(rows), 1), self.token),
            "attention_mask": torch.ones((len(rows), 1), dtype=torch.long),
        }


def feature_source(model: PreTrainedModel, vectors: Tensor, labels: np.ndarray) -> Source:
    """A `Source` of features [rows, width] for `model` inside `without_backbone`."""
    end = model.config.eos_token_id
    return Source(FeatureRows(vectors, labels, end if isinstance(end, int) else 0), lambda batch: batch)


def backbone_digest(model: PreTrainedModel) -> str:
    """SHA-256 of everything that shapes features: class, config and every parameter byte of the base model."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_THE_BACKBONE}
    about = [FORMAT, type(model).__name__, config, str(model.config._attn_implementation)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for parameter in model.base_model.parameters():
        digest.update(f"{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def head_features(
    attachment: Attachment,
    examples: Examples,
    collate: Callable[[Any], Batch],
    accelerator: Accelerator,
    batch_size: int,
    store: FeatureStore,
) -> Tensor:
    """What the head of `attachment.model` reads for every row, without the adapter: float32 [rows, width] on the CPU.

    Taken from `store` if it is there. Raises `UnsupportedError` when the head reads more than one vector per row (span
    and masked-LM heads, unknown poolings), which is found out by comparing logits.
    """
    model = attachment.model
    with attachment.enabled(False):
        about = [backbone_digest(model), examples.digest(), batch_size // accelerator.num_processes]
        key = hashlib.sha256(json.dumps([*about, accelerator.device.type]).encode()).hexdigest()
        features = store.get(key)
        if not everywhere(accelerator, features is not None):
            features = _compute(model, examples, collate, accelerator, batch_size)
            store.put(key, features, write=accelerator.is_main_process)
            accelerator.wait_for_everyone()
    assert features is not None
    return features


def probe_rows(examples: Examples) -> list[int]:
    """A few rows, from the shortest to the longest."""
    by_length = np.argsort(examples.lengths, kind="stable")
    return by_length[np.unique(np.linspace(0, len(examples) - 1, PROBE_ROWS).round().astype(int))].tolist()


def _compute(
    model: PreTrainedModel,
    examples: Examples,
    collate: Callable[[Any], Batch],
    accelerator: Accelerator,
    batch_size: int,
) -> Tensor:
    outputs: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
    training = model.training
    model.eval()
    try:
        batch = collate(examples.__getitems__(probe_rows(examples)))
        reading = _find_reading(model, {name: t.to(accelerator.device) for name, t in batch.items()}, outputs)

        def step(batch: Batch) -> Tensor:
            logits = model(**inputs_of(batch)).logits
            vectors = reading(outputs.pop(), batch, model.config)
            assert vectors is not None
            return torch.cat([vectors.float(), logits.float()], dim=1)

        both = torch.from_numpy(collect(accelerator, Source(examples, collate), batch_size, step))
        labels = int(model.config.num_labels)  # type: ignore[arg-type]
        features, logits = both[:, :-labels].contiguous(), both[:, -labels:]
        _check_features(model, features, logits, accelerator.device)
    finally:
        handle.remove()
        model.train(training)
    return features


def _from_features(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    rows = feature_source(model, vectors, np.zeros(len(vectors), np.int64)).rows
    with without_backbone(model), torch.inference_mode():
        batch = inputs_of(rows.__getitems__(range(len(vectors))))
        return model(**{name: value.to(vectors.device) for name, value in batch.items()}).logits


def _find_reading(model: PreTrainedModel, batch: Batch, outputs: list[Any]) -> Reading:
    """The reading whose features give the model's own logits on `batch`, which has rows of all lengths."""
    with torch.inference_mode():
        logits = getattr(model(**inputs_of(batch)), "logits", None)
    output = outputs.pop()
    if logits is None or logits.ndim != 2:
        raise UnsupportedError(
            f"{type(model).__name__} reads every token, so its head cannot train on cached features"
        )
    gaps = {}
    for name, reading in READINGS.items():
        vectors = reading(output, batch, model.config)
        if vectors is not None:
            gaps[name] = float((_from_features(model, vectors) - logits).abs().max())
    best = min(gaps, key=lambda name: gaps[name])  # the first of equals
    if not gaps[best] <= _allowed(logits):  # NaN is no match either
        raise UnsupportedError(
            f"the head of {type(model).__name__} reads none of: {', '.join(gaps)} (the closest, {best}, is off by "
            f"{gaps[best]:.1e}), so it cannot train on cached features"
        )
    return READINGS[best]


def _allowed(logits: Tensor) -> float:
    spread = float((logits.amax(0) - logits.amin(0)).max())
    return max(OF_SPREAD * spread, OF_SIZE * float(logits.abs().max()))


def _check_features(model: PreTrainedModel, features: Tensor, logits: Tensor, device: torch.device) -> None:
    """Every row's logits from its features must be those of the whole model."""
    gap = max(
        float((_from_features(model, vectors.to(device)).cpu() - whole).abs().max())
        for vectors, whole in zip(features.split(1024), logits.split(1024), strict=True)
    )
    if not gap <= _allowed(logits):
        raise UnsupportedError(
            f"the logits of {type(model).__name__} differ by {gap:.1e} when its head reads cached features, so it "
            "cannot train on them"
        )
