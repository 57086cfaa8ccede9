"""How long runs will take, from the recorded times of runs like them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hadamard_toolkit.paths import in_checkout
from hadamard_toolkit.runs.environment import describe_device
from hadamard_toolkit.runs.labels import method_name
from hadamard_toolkit.runs.reference import REFERENCE
from hadamard_toolkit.runs.spec import RunSpec, canonical_json
from hadamard_toolkit.runs.store import COLUMNS, RunStore

# The columns that two runs must share for the time of one to predict that of the other, the closest match first, and
# how such runs differ, in words.
LIKE = {
    ("backbone", "task", "adapter", "sparsity", "protocol"): "runs with another seed",
    ("backbone", "task", "protocol"): "runs of other methods",
    ("backbone", "method", "head_policy"): "runs of other sizes, by rows and epochs, which is rough",
}
SCALED = ("backbone", "method", "head_policy")


@dataclass(frozen=True)
class Estimate:
    """Seconds for some runs, one after the other.

    rests_on: how many of them are estimated from what, in words. unknown: how many are not counted, as nothing like
    them is recorded. devices: where the recorded runs ran, unless that was a device like that of this machine.
    """

    seconds: float
    rests_on: Mapping[str, int]
    unknown: int
    devices: tuple[str, ...]

    def words(self, workers: int = 1) -> str:
        """The estimate in one line, for so many runs at a time."""
        if not self.rests_on:
            return "no estimate: nothing like these runs is recorded yet"
        where = (
            f"on {' or '.join(self.devices)}; none is recorded here" if self.devices else "on this machine"
        )
        at_once = f", {workers} at a time" if workers > 1 else ""
        basis = [f"{count} from {what}" for what, count in self.rests_on.items()]
        if self.unknown:
            basis.append(f"{self.unknown} like nothing that is recorded, so not counted")
        return f"about {duration(self.seconds / workers)} {where}{at_once} ({'; '.join(basis)})"


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def estimate(specs: Iterable[RunSpec], store: RunStore) -> Estimate:
    """What `specs` will take, from the median times of like runs in `store` and, in a checkout, the reference runs.

    Runs on a device like that of this machine count alone, where there are any.
    """
    import torch

    past, devices = _recorded(store), ()
    here = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))["device_name"]
    if (past["device"] == here).any():
        past = past[past["device"] == here]
    else:
        devices = tuple(sorted(past["device"].unique()))
    past = past.assign(pace=past["seconds"] / past["work"])
    medians = {
        columns: past.groupby(list(columns))["pace" if columns == SCALED else "seconds"].median()
        for columns in LIKE
    }
    total, unknown, rests_on = 0.0, 0, dict.fromkeys(LIKE.values(), 0)
    for spec in specs:
        described = _described(spec)
        for columns, what in LIKE.items():
            median = medians[columns].get(tuple(described[column] for column in columns))
            size = described["work"] if columns == SCALED else 1
            if median is not None and size is not None:
                total += float(median) * size
                rests_on[what] += 1
                break
        else:
            unknown += 1
    return Estimate(total, {what: count for what, count in rests_on.items() if count}, unknown, devices)


def _recorded(store: RunStore) -> pd.DataFrame:
    """A row per finished run, of the store and of the reference runs."""
    stores = [store, *([RunStore(REFERENCE)] if in_checkout() else [])]
    empty = pd.DataFrame(columns=list(COLUMNS))
    past = pd.concat([empty, *(each.load() for each in stores if each.folder.is_dir())]).drop_duplicates(
        "key"
    )
    protocols = map(json.loads, past["protocol"])
    work = [_work(protocol, rows) for protocol, rows in zip(protocols, past["train_rows"], strict=True)]
    return past.assign(work=pd.Series(work, past.index, float), seconds=past["seconds"].astype(float))


def _described(spec: RunSpec) -> dict[str, Any]:
    """The columns of a store's table that a spec decides, and the `work` it asks for."""
    plain = spec.to_dict()
    return {
        "backbone": plain["backbone"],
        "task": plain["task"],
        "method": method_name(spec.adapter),
        "head_policy": spec.protocol.head,
        **{name: canonical_json(plain[name]) for name in ("adapter", "protocol", "sparsity")},
        "work": _work(plain["protocol"], spec.protocol.train_rows),
    }


def _work(protocol: Mapping[str, Any], rows: int | None) -> float | None:
    """Rows times epochs, including those of the head's own stage; None where the protocol takes all rows of a task."""
    first = protocol["head_epochs"] if protocol["head"] == "first-then-frozen" else 0
    return None if rows is None else float(rows * (protocol["epochs"] + first))
