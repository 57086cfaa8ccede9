"""What there is: which runs of the plans a store holds, and which figures were drawn from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore


def plan_coverage(store: RunStore, plans: Mapping[str, Iterable[RunSpec]]) -> pd.DataFrame:
    """How far each plan has been run: `plan` (the index), `planned`, `done`, `refused`, `missing`, `by_method`.

    `plans` holds by name the runs of each plan, as `load_plan` gives them.
    `refused` counts runs whose failure is recorded in the store; `by_method` says which methods the missing runs are
    of.
    """
    rows = []
    for plan, wanted in plans.items():
        specs = list(wanted)
        refused = set(store.only(specs).failed()["key"])
        missing = [spec for spec in specs if spec not in store and spec.key not in refused]
        counts = (
            pd.Series([type(spec.adapter).__name__ for spec in missing], dtype=str)
            .value_counts()
            .sort_index()
        )
        rows.append(
            {
                **{"plan": plan, "planned": len(specs)},
                "done": len(specs) - len(missing) - len(refused),
                **{"refused": len(refused), "missing": len(missing)},
                "by_method": ", ".join(f"{name} {count}" for name, count in counts.items()) or "none",
            }
        )
    return pd.DataFrame(rows).set_index("plan")


def figure_list(folder: str | Path) -> pd.DataFrame:
    """The figures of the reference profile in a folder, from the JSON beside each: `figure`, `rows`, `caption`."""
    records: list[Mapping[str, object]] = [
        json.loads(path.read_text("utf-8")) for path in sorted(Path(folder).glob("*.json"))
    ]
    shown = [record for record in records if record["profile"] == "reference"]
    rows = [(record["figure"], record["table"]["rows"], record["caption"]) for record in shown]  # type: ignore[index]
    return pd.DataFrame(rows, columns=["figure", "rows", "caption"]).set_index("figure")
