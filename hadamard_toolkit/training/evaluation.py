"""Running a model over rows, on any number of processes, and scoring what comes out."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn import functional

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training import metrics
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.protocol import Protocol


def open_accelerator(protocol: Protocol) -> Accelerator:
    """An `Accelerator` for one run: CUDA, else the CPU; as many processes as `accelerate launch` started.

    Batches are split over the processes, so that a protocol's `batch_size` means the same on any number of them.
    Raises `ArgumentError` where they cannot be split evenly.
    """
    precision = "bf16" if protocol.precision == "bf16" else "no"
    # A process has one such state, which refuses a second precision; runs of both precisions may follow each other.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    for field in ("batch_size", "eval_batch_size"):
        if getattr(protocol, field) % accelerator.num_processes:
            raise ArgumentError(
                f"{field}={getattr(protocol, field)} is not allowed on {accelerator.num_processes} processes; "
                "it must be a multiple of their number"
            )
    return accelerator


def inputs_of(batch: Batch) -> Batch:
    """What the model reads of a batch."""
    return {key: value for key, value in batch.items() if key not in ("row", "labels")}


def collect(
    accelerator: Accelerator, source: Source, batch_size: int, step: Callable[[Batch], Tensor]
) -> np.ndarray:
    """`step(batch)` [rows of the batch, width] over all rows without gradients: float32 [rows, width], in row order.

    Every process gets the whole result.
    """
    positions, values = [], []
    with torch.inference_mode():
        for batch in accelerator.prepare_data_loader(source.evaluation(batch_size)):
            row, value = accelerator.gather((batch["row"], step(batch).float().contiguous()))
            positions.append(row)
            values.append(value)
    batched = torch.cat(values).cpu().numpy()
    result = np.empty((len(source.rows), batched.shape[1]), np.float32)
    # The last batch may repeat rows, so that processes get equally many; a repeated row has the same value.
    result[torch.cat(positions).cpu().numpy()] = batched
    return result


def collect_in_evaluation(
    accelerator: Accelerator,
    model: nn.Module,
    source: Source,
    batch_size: int,
    step: Callable[[Batch], Tensor],
) -> np.ndarray:
    """`collect` with `model` in evaluation mode and in the accelerator's precision; restores the model's mode."""
    training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            return collect(accelerator, source, batch_size, step)
    finally:
        model.train(training)


def everywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true in every process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).all())


def score(names: tuple[str, ...], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics `names` and the mean `loss` (cross-entropy, or squared error where labels are floats)."""
    outputs, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    if targets.is_floating_point():
        loss = functional.mse_loss(outputs[:, 0], targets.double())
    else:
        loss = functional.cross_entropy(outputs, targets)
    return {**metrics.compute(names, logits, labels), "loss": float(loss)}


def device_name(accelerator: Accelerator) -> str:
    """The device in words: a GPU's name, or the CPU with its threads."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} threads)"
