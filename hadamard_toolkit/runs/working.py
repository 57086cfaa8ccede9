"""The store that a notebook trains into."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hadamard_toolkit.paths import CHECKOUT, in_checkout
from hadamard_toolkit.runs.store import RunStore

PAPER = Path("runs") / "paper"


def working_store(profile: str) -> RunStore:
    """Where the runs of a notebook go: `$HADAMARD_STORE`, or what fits the profile.

    In the `paper` profile that is `runs/paper` of the checkout (or of the working folder), which stays: hours of
    training are not repeated, and a notebook that was stopped resumes. In any other profile it is a new temporary
    folder.
    """
    if chosen := os.environ.get("HADAMARD_STORE"):
        return RunStore(chosen)
    if profile == "paper":
        return RunStore((CHECKOUT if in_checkout() else Path.cwd()) / PAPER)
    return RunStore(tempfile.mkdtemp(prefix="hadamard-runs-"))
