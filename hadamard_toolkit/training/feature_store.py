"""Tensors that the frozen backbone computed, kept in memory and on disk by the content that they were made from."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hadamard_toolkit.errors import StoreError
from hadamard_toolkit.paths import atomic_write

GIB = 1 << 30
STATES = "states-"  # files of hidden states begin so


class FeatureStore:
    """Features by content: in memory up to `memory` bytes, and as safetensors files in `folder`, if one is given.

    The key covers the backbone's weights and config, the token ids and how they are batched, so features of a backbone
    that has changed are never read. A damaged file counts as absent.

    Hidden states are larger. They are in memory where those of a whole run fit into `memory`, and else in
    memory-mapped files, which take up to `disk` bytes of the folder: the least recently used are deleted first.
    """

    def __init__(self, folder: str | Path | None = None, *, memory: int = GIB, disk: int = 32 * GIB) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.memory, self.disk = memory, disk
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        """The features under `key`, or None."""
        features = self._held.get(key)
        if features is None and self.folder is not None:
            features = _read(self.folder / f"{key}.safetensors")
        if features is not None:
            self._hold(key, features)
        return features

    def put(self, key: str, features: Tensor, *, write: bool = True) -> None:
        """Keep `features`, and write them to the folder, wholly or not at all.

        A folder that cannot be written to is no error: the features are kept in memory.
        """
        self._hold(key, features)
        if write and self.folder is not None:
            with suppress(OSError):
                _write(self.folder / f"{key}.safetensors", features)

    def get_states(self, key: str) -> Tensor | None:
        """The hidden states under `key`, or None."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if self.folder is None:
            return None
        path = self.folder / f"{STATES}{key}.safetensors"
        with suppress(OSError):
            os.utime(path)  # the time of its last use
        return _read(path)

    def put_states(self, key: str, states: Tensor, *, on_disk: bool) -> Tensor:
        """Keep hidden states in memory or, `on_disk`, in a memory-mapped file; what is returned lies there.

        Raises `StoreError` where the file cannot be written or read back.
        """
        if not on_disk:
            self._hold(key, states)
            return states
        assert self.folder is not None
        path = self.folder / f"{STATES}{key}.safetensors"
        try:
            self._make_room(states.nbytes)
            _write(path, states)
        except OSError as error:
            raise StoreError(f"hidden states cannot be written to {str(path)!r}: {error}") from error
        mapped = _read(path)
        if mapped is None:
            raise StoreError(f"hidden states cannot be read back from {str(path)!r}")
        return mapped

    def _make_room(self, needed: int) -> None:
        """Delete files of hidden states, the least recently used first, until `needed` bytes fit beside the others."""
        assert self.folder is not None
        files = {path: path.stat() for path in self.folder.glob(f"{STATES}*.safetensors")}
        used = sum(about.st_size for about in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if used + needed <= self.disk:
                return
            path.unlink(missing_ok=True)
            used -= files[path].st_size

    def _hold(self, key: str, features: Tensor) -> None:
        self._held[key] = features
        self._held.move_to_end(key)
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self.memory:
            self._held.popitem(last=False)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _write(path: Path, features: Tensor) -> None:
    atomic_write(path, save({"features": features}, metadata={"sha256": _digest(features)}))


def _read(path: Path) -> Tensor | None:
    """The features in a file, memory-mapped; None where there is no such file or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
            return features if (file.metadata() or {}).get("sha256") == _digest(features) else None
    except (OSError, SafetensorError):
        return None
