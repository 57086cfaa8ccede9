"""Train the plan of PROTOCOL.md on 300 rows: `python tools/fair_runs.py --store data/reference_runs`.

A rate is picked on held-out rows before the seeds can be trained at it, so no plan file can say beforehand what to
train. This script decides step by step from what the store holds, trains what is missing, and writes the plan of all
that is there (`fair.toml` in the store). It goes on where it was stopped; `--plan-only` trains nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import hadamard_toolkit as ht
from hadamard_toolkit.runs.labels import label_of

TASKS = [
    "sst2",
    *(f"embedded/{name}-polarity" for name in ("movies", "products", "editorials", "tweets")),
    "embedded/domain-identification",
]
LADDER = [float(f"{digit}e{power}") for power in range(-7, 0) for digit in (1, 3)]
VECTORS, MATRICES, FULL = (
    (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
)
HEAD = ht.HeadOnly()
# adapter -> its rates, and whether the head is trained first
METHODS: dict[ht.Adapter, tuple[tuple[float, ...], bool]] = {
    HEAD: (VECTORS, True),
    ht.Hadamard(): (VECTORS, True),
    ht.LayerNormTuning(norm="both"): (VECTORS, True),
    ht.FullFineTuning(): (FULL, False),
    ht.LayerNormTuning(): (VECTORS, True),
    ht.BitFit(): (VECTORS, False),
    ht.LoRA(): (MATRICES, False),
    ht.Pfeiffer(): (MATRICES, False),
}
FIRST = 4  # methods whose seeds come before the rates of the others
SEEDS = range(5)
BEYOND = 2  # rates that are tried at most beyond the grid
SIZES = {"train_rows": 300, "validation_rows": 200, "test_rows": 400, "batch_size": 16, "precision": "bf16"}


class Runs:
    """The runs of the plan in one store."""

    def __init__(self, store: ht.RunStore, *, train: bool) -> None:
        self.store, self.train = store, train
        self.specs: list[ht.RunSpec] = []

    def spec(self, task: str, adapter: ht.Adapter, rate: float, head: float | None, seed: int) -> ht.RunSpec:
        """`rate` is that of the stage that is picked for; `head` that of stage one, where there is one before it."""
        if adapter == HEAD:
            protocol = ht.protocols.hadamard(head_learning_rate=rate, epochs=10, **SIZES)
        elif METHODS[adapter][1]:
            protocol = ht.protocols.hadamard(learning_rate=rate, head_learning_rate=head, epochs=10, **SIZES)
        else:
            protocol = ht.protocols.full_fine_tuning(learning_rate=rate, epochs=10, **SIZES)
        return ht.RunSpec("minilm-l6", task, adapter, protocol, seed=seed)

    def done(self, spec: ht.RunSpec) -> bool:
        """Whether the run is there, after training it if that is wanted."""
        if spec not in self.store and self.train:
            print(f"{spec.task} {label_of(spec.adapter)} seed {spec.seed}", flush=True)
            ht.sweep([spec], self.store)
        if spec in self.store:
            self.specs.append(spec)
        return spec in self.store

    def pick(self, task: str, adapter: ht.Adapter, head: float | None) -> float | None:
        """The rate with the best score on the held-out rows of seed 0, or None while one is missing."""
        rates = list(METHODS[adapter][0])
        for beyond in range(BEYOND + 1):
            specs = {rate: self.spec(task, adapter, rate, head, 0) for rate in rates}
            there = [self.done(spec) for spec in specs.values()]  # all of them, also behind a missing one
            if not all(there):
                return None
            best = max(rates, key=lambda rate: self._held_out(specs[rate]))
            if best not in (min(rates), max(rates)) or beyond == BEYOND:
                return best
            rates.append(LADDER[LADDER.index(best) + (1 if best == max(rates) else -1)])
        return None

    def _held_out(self, spec: ht.RunSpec) -> tuple[float, float]:
        record = self.store.record(spec.key)
        scores = record["metrics"]["validation"]
        return scores[record["headline"]], -scores["loss"]

    def write_plan(self) -> None:
        """What is there, as grids of tasks that share all else."""
        grids: dict[tuple[ht.Adapter, str, tuple[int, ...]], list[str]] = defaultdict(list)
        seeds: dict[tuple[ht.Adapter, str, str], set[int]] = defaultdict(set)
        for spec in self.specs:
            seeds[spec.adapter, _overrides(spec), spec.task].add(spec.seed)
        for (adapter, overrides, task), found in seeds.items():
            grids[adapter, overrides, tuple(sorted(found))].append(task)
        text = HEADER + "".join(_grid(*key, tasks) for key, tasks in grids.items())
        (self.store.folder / "fair.toml").write_text(text)


HEADER = """\
# MiniLM on 300 rows of six tasks, by PROTOCOL.md; written by tools/fair_runs.py, which picks the rates:
# hadamard sweep data/reference_runs/fair.toml --store data/reference_runs --keep vectors
"""


def _overrides(spec: ht.RunSpec) -> str:
    protocol = spec.protocol
    fields = {"learning_rate": protocol.learning_rate, "epochs": protocol.epochs}
    if spec.adapter == HEAD:
        fields["learning_rate"] = ht.protocols.hadamard().learning_rate
    if METHODS[spec.adapter][1]:
        fields["head_learning_rate"] = protocol.head_learning_rate
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in {**fields, **SIZES}.items())


def _grid(adapter: ht.Adapter, overrides: str, seeds: Iterable[int], tasks: list[str]) -> str:
    preset = "hadamard" if METHODS[adapter][1] else "full_fine_tuning"
    return f"""
[[grid]]
tasks = {json.dumps(tasks)}
adapters = ['{label_of(adapter)}']
seeds = {list(seeds)}
protocol = "{preset}"
overrides = {{ {overrides} }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--plan-only", action="store_true")
    options = parser.parse_args()
    runs = Runs(ht.RunStore(options.store, keep="vectors"), train=not options.plan_only)
    heads = {task: runs.pick(task, HEAD, None) for task in TASKS}
    adapters = list(METHODS)
    for group in (adapters[:FIRST], adapters[FIRST:]):
        rates: dict[ht.Adapter, dict[str, float | None]] = {HEAD: heads}
        for adapter in group:
            if adapter != HEAD:
                rates[adapter] = {task: runs.pick(task, adapter, heads[task]) for task in TASKS}
                runs.write_plan()
        for seed in SEEDS:
            for adapter in group:
                for task in TASKS:
                    if (rate := rates[adapter][task]) is not None:
                        runs.done(runs.spec(task, adapter, rate, heads[task], seed))
            runs.write_plan()


if __name__ == "__main__":
    main()
