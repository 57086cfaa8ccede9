"""The real data where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def local_data(folder: str) -> Path:
    """The data root that holds `folder`; skips, with the reason, where there is none."""
    chosen = os.environ.get("HADAMARD_DATA")
    root = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "data"
    if not (root / folder).is_dir():
        pytest.skip(f"no local files: neither $HADAMARD_DATA nor ../shared/data holds {folder}/")
    return root
