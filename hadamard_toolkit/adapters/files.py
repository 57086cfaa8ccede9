"""The files of a saved attachment: `adapter_config.json`, `adapter_model.safetensors`, and masks if there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hadamard_toolkit.adapters.masking import BITS, RECORD, Masking, compact, expand, read_masks, write_masks
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.paths import atomic_folder, atomic_write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1


def write_attachment(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], masking: Masking | None
) -> None:
    """Write `folder` wholly or not at all; into one that exists (a run's, say) file by file, each of them so."""
    if folder.is_dir():
        _write(folder, config, state, masking)
        return
    with atomic_folder(folder) as staging:
        _write(staging, config, state, masking)


def _write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], masking: Masking | None) -> None:
    if masking:
        write_masks(folder, masking.kept, masking.record)
        state = compact(state, masking.kept)
    else:
        for name in (BITS, RECORD):  # of an earlier save
            (folder / name).unlink(missing_ok=True)
    atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    atomic_write(folder / WEIGHTS, save(state))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a saved attachment; one clear error for a folder that is none."""
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(
            f"folder={str(folder)!r} holds no saved attachment ({CONFIG} is missing)"
        ) from None
    except ValueError as error:
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is not valid JSON: {error}") from None
    if config.get("format") != FORMAT:
        kind = "a stock peft adapter" if "peft_type" in config else f"format {config.get('format')!r}"
        raise DataError(
            f"folder={str(folder)!r} holds {kind}; load_attachment reads format {FORMAT} of this toolkit"
        )
    return config


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved attachment by name, in full: entries that a mask has removed are zero."""
    state = load_file(Path(folder) / WEIGHTS)
    return expand(state, read_masks(Path(folder))[0]) if read_config(folder).get("masks") else state


def stack_vectors(state: dict[str, Tensor], layers: int) -> dict[str, np.ndarray]:
    """Stack the one-dimensional adapter and norm tensors of a state over `layers`; see `Attachment.vectors`."""
    stacked: dict[str, np.ndarray] = {}
    for name, value in state.items():
        role, kind, *rest = name.split(".", 3)
        if role in ("adapter", "norm") and kind == "layers" and value.ndim == 1:
            layer, label = int(rest[0]), rest[1]
            if label not in stacked:
                stacked[label] = np.full((layers, value.numel()), np.nan, dtype=np.float32)
            stacked[label][layer] = value.float().numpy()
    return stacked


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """16 hex digits from names, shapes and first values (in bfloat16) of the base model's `parameters`."""
    digest = sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:32].to(torch.bfloat16).view(torch.int16)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
