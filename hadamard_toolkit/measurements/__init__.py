"""Measurements on finished runs: functions of a run and its store that may load models; a tidy table out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pandas as pd

from hadamard_toolkit.errors import check_choice

if TYPE_CHECKING:
    from hadamard_toolkit.runs.record import Run
    from hadamard_toolkit.runs.store import RunStore

__all__ = ["MEASUREMENTS", "measure"]

# name, which is the function's too -> module
MEASUREMENTS = {
    "attention": "attention",
    "gates": "gates",
    "removal": "layer_ablation",
    "sharing": "sharing",
    "sharing_alike": "sharing",
    "taylor": "layer_ablation",
    "transplant": "cross_task_transfer",
}


def measure(name: str, run: Run, store: RunStore) -> pd.DataFrame:
    """The table `name` of `run`: read from `store` if it was measured before, else measured now and kept there.

    Names are those of `MEASUREMENTS`; what each measures is said where it is defined. A measurement that does not apply
    to a run (gates of a run without gates) raises `ArgumentError` or `UnsupportedError`.
    """
    check_choice("name", name, MEASUREMENTS)
    module = importlib.import_module(f"{__name__}.{MEASUREMENTS[name]}")
    return store.measured(run.key, name, lambda: getattr(module, name)(run, store))
