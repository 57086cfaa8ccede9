"""Shared by all tests: no hub, no progress bars, no screen, one thread per worker, fixed random examples."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any import that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HADAMARD_PROGRESS="0",
    HADAMARD_PROFILE="smoke",
    MPLBACKEND="Agg",
)

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The same examples in every run: a red CI is a change in the code, not a lucky draw.
# `--hypothesis-profile=explore` looks further.
settings.register_profile(
    "fixed",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", max_examples=500, deadline=None)
settings.load_profile("fixed")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def minilm() -> Callable[..., tuple[Any, Any]]:
    """A factory: `minilm(labels=2, head="classification", seed=0)` gives a fresh `(model, tokenizer)`.

    It reads the cached weights, so it costs well under a second; `make setup` has fetched them.
    """
    import hadamard_toolkit as ht

    def fresh(**choices: Any) -> tuple[Any, Any]:
        try:
            return ht.load_backbone("minilm-l6", **choices)
        except OSError as missing:
            pytest.fail(f"the embedded backbone is not in the cache; run `make setup` ({missing})")

    return fresh


@pytest.fixture(scope="session")
def glue_root() -> Path:
    """The folder that holds `glue/<TASK>/*.parquet`; skips, with the reason, where there is none."""
    chosen = os.environ.get("HADAMARD_DATA")
    root = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "data"
    if not (root / "glue" / "SST-2" / "train.parquet").is_file():
        pytest.skip(
            "no local GLUE files: neither $HADAMARD_DATA nor ../shared/data holds glue/SST-2/train.parquet"
        )
    return root
