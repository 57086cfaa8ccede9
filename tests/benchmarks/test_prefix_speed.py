"""Adapters in the top third of the layers over a cached prefix, against adapters in all layers: seconds per epoch.

`python -m pytest -m benchmark tests/benchmarks/test_prefix_speed.py -s` prints a table and writes it, with machine and
versions, to `build/benchmarks/prefix_speed_<device>.json` (`$HADAMARD_BENCHMARKS` moves the folder). The backbone is
MiniLM, the rows are of SST-2. Every number is a median over the epochs after the first of trainings that take turns.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.runs import environment
from hadamard_toolkit.training.protocol import Protocol

pytestmark = [pytest.mark.benchmark, pytest.mark.glue]

OUT = Path(os.environ.get("HADAMARD_BENCHMARKS", "build/benchmarks"))
TOP = (4, 5)  # of six layers
ROWS, TURNS = 384, 3
PROTOCOL = Protocol(
    epochs=3, batch_size=32, learning_rate=5e-3, train_rows=ROWS, validation_rows=ROWS // 2, test_rows=8
)
CASES: dict[str, tuple[str | tuple[int, ...], str]] = {
    "all layers": ("all", "computed"),
    "top third": (TOP, "computed"),
    "top third, cached prefix": (TOP, "cached"),
}


def test_a_cached_prefix_against_adapters_in_all_layers(glue_root: Path) -> None:
    task = ht.load_task("sst2", root=glue_root)
    steps: dict[str, list[float]] = {name: [] for name in CASES}
    evaluations: dict[str, list[float]] = {name: [] for name in CASES}
    features: dict[str, float] = {}
    for turn in range(TURNS):
        for name, (layers, prefix) in CASES.items():
            model, tokenizer = ht.load_backbone("minilm-l6", labels=task.n_labels)
            attachment = ht.attach(model, ht.Hadamard(layers=layers))
            protocol = replace(PROTOCOL, frozen_prefix=prefix)
            outcome = ht.train(attachment, task, tokenizer, protocol, seed=turn)
            steps[name] += [row["seconds"] for row in outcome.history[1:]]
            evaluations[name].append(outcome.times["evaluation"] / (len(outcome.history) + 1))
            features[name] = outcome.times["features"]
    rows = []
    for name in CASES:
        epoch, evaluation = statistics.median(steps[name]), statistics.median(evaluations[name])
        rows.append(
            {
                "adapters": name,
                "epoch_seconds": round(epoch, 2),
                "faster": round(statistics.median(steps["all layers"]) / epoch, 2),
                "evaluation_seconds": round(evaluation, 2),
                "evaluation_faster": round(statistics.median(evaluations["all layers"]) / evaluation, 2),
                "prefix_seconds": round(features[name], 2),  # once
            }
        )
        print(rows[-1])
    device = environment.describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts = {
        "device": device,
        "system": environment.system(),
        "versions": environment.versions(),
        "threads": torch.get_num_threads(),
        "protocol": PROTOCOL.to_dict(),
        "rows": rows,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"prefix_speed_{device['device']}.json").write_text(json.dumps(facts, indent=1) + "\n")
