"""Measurements on finished runs: functions of a run and its store that may load models and return a tidy table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pandas as pd

from hadamard_toolkit.errors import check_choice

if TYPE_CHECKING:
    from hadamard_toolkit.runs.record import Run
    from hadamard_toolkit.runs.store import RunStore

__all__ = ["MEASUREMENTS", "measure"]

# name of the function -> module
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
    """The table `name` of `run`, from `store` if it was measured before; otherwise it is measured and stored.

    Names are those of `MEASUREMENTS`; the function of that name documents its table. A measurement that does not apply
    to a run (such as gates of a run without gates) raises `ArgumentError` or `UnsupportedError`.
    """
    check_choice("name", name, MEASUREMENTS)
    module = importlib.import_module(f"{__name__}.{MEASUREMENTS[name]}")
    return store.measured(run.key, name, lambda: getattr(module, name)(run, store))
