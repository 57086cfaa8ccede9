"""Folders that cannot be written to, also for root, which is not asked for permission otherwise."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSION_3 = 0x20080522
_OVERRIDES = 1 << 1  # CAP_DAC_OVERRIDE


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("process", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """Inside the block nothing can be written into `folders`, nor below them; files may still be read."""
    modes = {path: path.stat().st_mode for top in folders for path in (top, *top.rglob("*")) if path.is_dir()}
    with _without_privilege():
        try:
            for path, mode in modes.items():
                path.chmod(mode & 0o555)
            if any(os.access(path, os.W_OK, effective_ids=True) for path in folders):
                pytest.skip("this user may write everywhere")
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)


@contextmanager
def _without_privilege() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets) != 0:
        pytest.skip("the privileges of root cannot be laid down here")
    before = sets[0].effective
    sets[0].effective &= ~_OVERRIDES
    if libc.capset(ctypes.byref(header), sets) != 0:
        pytest.skip("the privileges of root cannot be laid down here")
    try:
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)
