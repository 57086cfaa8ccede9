"""The files of a saved attachment: `adapter_config.json`, `adapter_model.safetensors`, and masks if there are any."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hadamard_toolkit.adapters.masking import BITS, RECORD, Masking, compact, expand, mask_files, read_masks
from hadamard_toolkit.errors import ArgumentError, DataError, StoreError
from hadamard_toolkit.paths import atomic_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 2
# Format 1 had no digests of its files, and only the first values of the backbone in its fingerprint.
READS = (1, 2)


def write_attachment(
    folder: str | Path, config: dict[str, Any], state: dict[str, Tensor], masking: Masking | None
) -> None:
    """Write the files of an attachment wholly or not at all; other files in `folder` (of a run, say) stay.

    The config has the SHA-256 of the other files, so that the files of two saves are never mixed up.

    Raises `ArgumentError` for a folder without a name and for a file, `StoreError` where it cannot be written to.
    """
    if not str(folder):
        raise ArgumentError(f"folder={folder!r} is not allowed: it would be the working folder; name one")
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"folder={str(folder)!r} is not allowed: there is a file of that name")
    files = {WEIGHTS: save(compact(state, masking.kept) if masking else state)}
    if masking:
        files |= mask_files(masking.kept, masking.record)
    digests = {name: sha256(data).hexdigest() for name, data in files.items()}
    files[CONFIG] = (json.dumps({**config, "files": digests}, indent=2) + "\n").encode()
    try:
        atomic_files(target, files)
        # Masks of an earlier save.
        for name in {BITS, RECORD} - set(files):
            (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"folder={str(folder)!r} cannot be written to: {error.strerror or error}; the attachment is not saved. "
            "Choose another folder, or make this one writable with some room on its disk"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a saved attachment.

    Raises `ArgumentError` for a folder without one, `DataError` for one that is damaged or of another kind.
    """
    path = Path(folder).expanduser() / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(
            f"folder={str(folder)!r} holds no saved attachment ({CONFIG} is missing)"
        ) from None
    except ValueError as error:
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is not that of an attachment: {config!r}")
    if config.get("format") not in READS:
        kind = "a stock peft adapter" if "peft_type" in config else f"format {config.get('format')!r}"
        raise DataError(
            f"folder={str(folder)!r} holds {kind}; load_attachment reads formats {READS[0]} to {READS[-1]} of this "
            "toolkit, import_peft those of peft"
        )
    if lacking := {"adapter", "seed", "backbone", *(["files"] if config["format"] > 1 else [])} - set(config):
        raise DataError(f"{CONFIG} in folder={str(folder)!r} is damaged: it has no {sorted(lacking)[0]!r}")
    return config


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved attachment by name; entries that a mask has removed are zero.

    Raises `DataError` for files that are missing, damaged, or not those that were saved with the config.
    """
    config, path = read_config(folder), Path(folder).expanduser()
    kept = read_masks(path)[0] if config.get("masks") else {}
    for name, digest in config.get("files", {WEIGHTS: None}).items():
        if not (path / name).is_file():
            raise DataError(
                f"the attachment in folder={str(folder)!r} is incomplete: {name} is missing; save it again"
            )
        if digest is not None and sha256((path / name).read_bytes()).hexdigest() != digest:
            raise DataError(
                f"{name} in folder={str(folder)!r} is damaged, or from another save than {CONFIG}; save the "
                "attachment again"
            )
    return expand(read_tensors(path / WEIGHTS), kept)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; `DataError` where it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path.name} in folder={str(path.parent)!r} cannot be read: {error}") from None


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
