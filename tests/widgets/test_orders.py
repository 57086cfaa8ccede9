"""Orders in which layers go."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets.orders import consensus_order


def test_consensus_leaves_the_task_itself_out(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="measured"):
        consensus_order(store, {"sst2"}, range(3))
    rows = []
    for task, worth in (("a", (1, 2, 4)), ("b", (1, 3, 4)), ("sst2", (9, 2, 1))):
        for code in range(8):
            kept = [layer for layer in range(3) if code >> layer & 1]
            score = sum(worth[layer] for layer in kept) / 20
            for split in ("validation", "test"):
                text = ",".join(map(str, kept))
                rows.append(
                    {
                        "key": f"run of {task}",
                        "task": task,
                        "seed": 0,
                        "kept": text,
                        "split": split,
                        "score": score,
                        "loss": 0.0,
                    }
                )
    monkeypatch.setattr("hadamard_toolkit.studies.tables.measured_table", lambda *_: pd.DataFrame(rows))
    assert consensus_order(store, {"sst2"}, range(3)) == (0, 1, 2)
    assert consensus_order(store, {"a", "b"}, range(3)) == (2, 1, 0)
    with pytest.raises(DataError, match="with 6 layers"):
        consensus_order(store, {"sst2"}, range(6))
