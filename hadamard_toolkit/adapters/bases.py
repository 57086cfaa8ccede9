"""Directions in the parameters of an adapter as files: named by their content, kept in the cache folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.paths import atomic_write, cache_folder, prepared_place


@dataclass(frozen=True)
class Basis:
    """Directions by the name of the vector that they move, each [directions, width], and how they were made."""

    directions: dict[str, Tensor]
    made: dict[str, Any]


def bases_folder() -> Path:
    """Where the files of bases are: `bases` in the cache folder (`HADAMARD_CACHE`)."""
    return cache_folder() / "bases"


def save_basis(directions: Mapping[str, ArrayLike], /, **made: Any) -> str:
    """Write a basis for `Subspace` and return its name: 16 hex digits of the SHA-256 of its tensors.

    `directions` has, for each vector of the wrapped adapter, an array [directions, width] under its name without the
    role, such as `layers.0.attention_output.weight`. Row i of all arrays together is direction i; a coefficient of 1
    adds it as it is. They are kept in float32. `made` says how they were made (plain JSON data) and is no part of the
    name. Raises `ArgumentError` for arrays that do not fit each other or are not finite.
    """
    tensors = {
        name: torch.as_tensor(rows).detach().cpu().float().contiguous() for name, rows in directions.items()
    }
    counts = {rows.shape[0] if rows.ndim == 2 else 0 for rows in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        raise ArgumentError(
            "directions must hold arrays [directions, width], with the same number of directions, at least one"
        )
    if not all(bool(rows.isfinite().all()) for rows in tensors.values()):
        raise ArgumentError("directions must be finite numbers")
    name = _name_of(tensors)
    atomic_write(bases_folder() / f"{name}.safetensors", save(tensors, {"made": json.dumps(made)}))
    return name


def load_basis(name: str) -> Basis:
    """The basis that `save_basis` wrote under `name`.

    Raises `ArgumentError` where it is missing, `DataError` where its file is damaged.
    """
    path = path_of_basis(name)
    if not path.is_file():
        raise ArgumentError(
            f"basis={name!r} is not in {path.parent}; copy its file there from the machine that has it, or make it "
            "again from the same runs (studies.subspace_plan does)"
        )
    try:
        with safe_open(path, "pt") as file:
            directions = {key: file.get_tensor(key) for key in sorted(file.keys())}
            made = json.loads((file.metadata() or {})["made"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it and make the basis again") from None
    if _name_of(directions) != name:
        raise DataError(f"{path} is damaged: its tensors are not those of its name; make the basis again")
    return Basis(directions, made)


def path_of_basis(name: str) -> Path:
    """Where the file of a basis lies, or would lie."""
    return (prepared_place("bases", name) or bases_folder()) / f"{name}.safetensors"


def _name_of(directions: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name, rows in sorted(directions.items()):
        digest.update(f"{name}{tuple(rows.shape)}".encode())
        digest.update(rows.numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]
