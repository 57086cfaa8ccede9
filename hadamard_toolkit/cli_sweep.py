"""A sweep with words around it: what there is to do, how long it may take, how far it is, what became of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hadamard_toolkit.runs.estimate import estimate
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import at_a_time, sweep
from hadamard_toolkit.training.progress import visible


def announce(
    title: str, specs: Sequence[RunSpec], store: RunStore, engine: str = "inline", workers: int | None = None
) -> list[RunSpec]:
    """Say what there is to do and how long it may take; the specs that the store lacks."""
    specs = [store.known(spec) for spec in specs]
    missing = [spec for spec in specs if spec not in store]
    known = len(specs) - len(missing)
    print(f"{title}: {len(specs)} runs, {known} in {store.folder}, {len(missing)} missing")
    if missing:
        print(estimate(missing, store).words(at_a_time(engine, workers, len(missing))), flush=True)
    return missing


def do_sweep(
    specs: Sequence[RunSpec],
    store: RunStore,
    engine: str,
    workers: int | None,
    *,
    bank: int | str = "auto",
) -> int:
    """Sweep, saying how far it is and what became of each run; 1 unless all is well."""
    report = None if visible() else lambda line: print(line, flush=True)
    table = sweep(specs, store, engine, workers, bank=bank, report=report)
    counts = table["status"].value_counts()
    print(
        ", ".join(
            f"{counts[status]} {status}"
            for status in ("present", "done", "failed", "outdated", "elsewhere")
            if status in counts
        )
    )
    wrong = table["status"].isin(["failed", "outdated"])
    for row in table[wrong & (report is None)].itertuples():  # a report has told the reasons already
        print(
            f"  {row.status}: {row.key}  {row.task}  {row.label}  seed {row.seed}  {row.reason}",
            file=sys.stderr,
        )
    return int(wrong.any())
