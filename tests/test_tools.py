"""What the scripts in tools/ promise."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.paths import CHECKOUT


def tool(name: str) -> ModuleType:
    """A script of `tools/`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("TEST_RESOLUTION" in os.environ, reason="other releases of matplotlib write other bytes")
def test_the_page_of_benchmarks_is_up_to_date() -> None:
    script = tool("benchmark_report")
    for name, made in (("benchmarks.md", script.report()), ("bank_cost.svg", script.drawing())):
        assert Path(script.DOCS, name).read_text("utf-8") == made, "run tools/benchmark_report.py"


class Scored:
    """A store whose runs score on held-out rows what `scores` says of their rate; others are not there."""

    def __init__(self, scores: dict[float, tuple[float | None, float]]) -> None:
        self.scores = scores

    def __contains__(self, spec: ht.RunSpec) -> bool:
        return spec.protocol.learning_rate in self.scores

    def record(self, key: str) -> dict[str, Any]:
        score, loss = self.scores[self.rates[key]]
        return {"headline": "accuracy", "metrics": {"validation": {"accuracy": score, "loss": loss}}}

    def spec(self, rate: float) -> ht.RunSpec:
        spec = ht.RunSpec("minilm-l6", "sst2", ht.Hadamard(), ht.protocols.hadamard(learning_rate=rate))
        self.rates = {**getattr(self, "rates", {}), spec.key: rate}
        return spec


@pytest.mark.parametrize(
    ("scores", "picked"),
    [
        ({1e-3: (0.5, 1.0), 3e-3: (0.7, 1.0), 1e-2: (0.6, 1.0)}, 3e-3),
        # Of equal scores the one with the lower loss.
        ({1e-3: (0.5, 1.0), 3e-3: (0.7, 1.0), 1e-2: (0.7, 0.9), 3e-2: (0.1, 1.0)}, 1e-2),
        # At an edge the next rate beyond is tried, twice at most.
        ({1e-3: (0.5, 1.0), 3e-3: (0.6, 1.0), 1e-2: (0.7, 1.0), 3e-2: (0.8, 1.0), 1e-1: (0.9, 1.0)}, 1e-1),
        ({1e-4: (0.3, 1.0), 3e-4: (0.9, 1.0), 1e-3: (0.7, 1.0), 3e-3: (0.6, 1.0), 1e-2: (0.5, 1.0)}, 3e-4),
        # An undefined score, such as the correlation of a constant, is the worst.
        ({1e-3: (None, 0.1), 3e-3: (0.0, 1.0), 1e-2: (-0.1, 1.0)}, 3e-3),
        # A run that failed leaves nothing to pick.
        ({1e-3: (0.5, 1.0), 1e-2: (0.6, 1.0)}, None),
    ],
)
def test_a_rate_is_picked_on_held_out_rows_and_inside_what_was_tried(
    scores: dict[float, tuple[float | None, float]], picked: float | None
) -> None:
    plans = tool("protocol_plans")
    store = Scored(scores)
    plan = plans.Plan(store, "plan", "a plan")
    cell = plan.pick("sst2", "Hadamard", (1e-3, 3e-3, 1e-2), store.spec)
    wanted = list(cell)
    assert plan.picked == {("sst2", "Hadamard"): picked}
    asked = {spec.protocol.learning_rate for specs in wanted for spec in specs}
    assert asked == set(scores) | {1e-3, 3e-3, 1e-2}
