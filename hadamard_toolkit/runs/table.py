"""A record as rows of the one tidy table: a row per split and metric."""

from __future__ import annotations

from typing import Any

from hadamard_toolkit.runs.record import is_subset
from hadamard_toolkit.runs.spec import canonical_json

COUNTS = ("trained", "stored", "nonzero")
ROLES = ("adapter", "norm", "gate", "head")
COLUMNS = (
    *("key", "backbone", "task", "method", "label", "head_policy", "pretraining", "seed"),
    *("split", "metric", "headline", "value", "n", "train_rows", "subset"),
    *COUNTS,
    *(f"{name}_with_head" for name in COUNTS),
    *(f"{name}_{role}" for name in COUNTS for role in ROLES),
    *("seconds", "device", "adapter", "protocol", "sparsity"),
)


def tidy(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one run.json."""
    spec, counts, sizes = record["spec"], record["counts"], record["rows"]
    fixed = {
        "key": record["key"],
        "backbone": spec["backbone"],
        "task": spec["task"],
        "method": record["method"],
        "label": record["label"],
        "head_policy": spec["protocol"]["head"],
        "pretraining": "+".join(step["text"] for step in spec["protocol"].get("pretraining", [])),
        "seed": spec["seed"],
        "train_rows": sizes["train"]["rows"],
        "seconds": record["times"]["total"],
        "device": record["meta_info"]["device"]["device_name"],
        **{field: canonical_json(spec[field]) for field in ("adapter", "protocol", "sparsity")},
    }
    for name in COUNTS:
        by_role = {role: counts[role][name] for role in ROLES}
        fixed |= {f"{name}_{role}": value for role, value in by_role.items()}
        fixed |= {f"{name}_with_head": sum(by_role.values()), name: sum(by_role.values()) - by_role["head"]}
    return [
        {
            **fixed,
            "split": split,
            "metric": metric,
            "headline": metric == record["headline"],
            "value": value,
            "n": sizes[split]["rows"],
            "subset": is_subset(split, record),
        }
        for split, values in record["metrics"].items()
        for metric, value in values.items()
    ]
