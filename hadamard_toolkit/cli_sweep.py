"""What the command line prints before, during and after a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hadamard_toolkit as ht


def announce(
    title: str, specs: Sequence[ht.RunSpec], store: ht.RunStore, engine: str, workers: int | None
) -> list[ht.RunSpec]:
    """Print what there is to do and how long it may take; returns the specs that the store lacks."""
    from hadamard_toolkit.runs.engines import at_a_time
    from hadamard_toolkit.runs.estimate import estimate

    missing = [spec for spec in map(store.known, specs) if spec not in store]
    known = len(specs) - len(missing)
    print(f"{title}: {len(specs)} runs, {known} in {store.folder}, {len(missing)} missing")
    if missing:
        print(estimate(missing, store).words(at_a_time(engine, workers, len(missing))), flush=True)
    return missing


def do_sweep(specs: Sequence[ht.RunSpec], store: ht.RunStore, *options: Any, **more: Any) -> int:
    """Sweep with the options of `ht.sweep`, printing progress; 1 if a run failed or is outdated, else 0."""
    from hadamard_toolkit.training.progress import visible

    report = None if visible() else lambda line: print(line, flush=True)
    table = ht.sweep(specs, store, *options, report=report, **more)
    counts = table["status"].value_counts()
    statuses = ("present", "done", "failed", "outdated", "elsewhere", "left")
    print(", ".join(f"{counts[status]} {status}" for status in statuses if status in counts))
    if left := counts.get("left"):
        print(f"{left} of {len(table)} runs left; the same command goes on")
    wrong = table["status"].isin(["failed", "outdated"])
    if report is None:  # a report has named the reasons already
        for row in table[wrong].itertuples():
            line = f"  {row.status}: {row.key}  {row.task}  {row.label}  seed {row.seed}  {row.reason}"
            print(line, file=sys.stderr)
    return int(wrong.any())
