"""Sharing: the score of a run when it shares its Hadamard vectors with other tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.measurements.cross_task_transfer import check_hadamard, donors, merged, retrain_head
from hadamard_toolkit.paths import cache_folder
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.ablation import PARTS
from hadamard_toolkit.studies.sharing import (
    BARE,
    SCHEMES,
    UNSHARED,
    Scheme,
    combine,
    parameters_per_task,
    part_of,
)
from hadamard_toolkit.tasks.registry import load_task
from hadamard_toolkit.training.feature_store import FeatureStore

COLUMNS = [
    *("scheme", "weight", "bias", "norm", "metric", "score", "validation", "n"),
    *("tasks", "with", "parameters", "percent"),
]


def sharing(
    run: Run,
    store: RunStore,
    *,
    tasks: Collection[str] | None = None,
    schemes: Collection[Scheme] = SCHEMES,
) -> pd.DataFrame:
    """The test score of `run`'s task when its vectors are shared with other tasks, one row per scheme.

    The vectors of each scheme (see `studies.sharing.Scheme`) are merged into the pretrained backbone, and a head is
    trained on them (`retrain_head`). Vectors are shared with the `donors` of the run, or with those on `tasks`. The row
    `"unshared"` is `run` itself.

    Columns: `scheme`, `weight`, `bias`, `norm` (where each comes from), `metric`, `score` and `validation` (in natural
    units), `n` (test rows), `tasks` (how many share, this one included), `with` (the others), `parameters` per task
    (heads left out; shared ones divided by `tasks`) and `percent` (of the backbone).

    Raises `UnsupportedError` for a run of another adapter or a span task, `DataError` for a run without donors.
    """
    check_hadamard(run, "sharing")
    others = [other for other in donors(run, store) if tasks is None or other.spec.task in tasks]
    if not others:
        raise DataError(f"the store has no run like {run.key} on another task, of the same protocol and seed")
    learned = {sharer.spec.task: sharer.vectors() for sharer in (run, *others)}
    model, tokenizer, attachment = run.restore()
    attachment.detach()
    fresh = attach(model, run.spec.adapter, seed=run.spec.seed)
    names = list(fresh.state_dict())
    identity = fresh.vectors()
    fresh.detach()
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    sizes = {
        part: sum(int(np.isfinite(a).sum()) for name, a in identity.items() if part_of(name) == part)
        for part in PARTS
    }
    rows = [{"scheme": UNSHARED, **dict.fromkeys(PARTS, "own"), **_scores(run.metrics, run.headline)}]
    for scheme in schemes:
        vectors = combine(learned, run.spec.task, scheme, identity, seed=_draw(run))
        # features of the bare backbone serve other runs as well; the others are used once, and would fill the cache
        features = FeatureStore(cache_folder() / "features" if scheme.name == BARE else None)
        with merged(model, run, _state(vectors, names)) as bare:
            outcome = retrain_head(bare, run, tokenizer, feature_store=features)
        origins = dict(zip(PARTS, scheme.sources(), strict=True))
        rows.append({"scheme": scheme.name, **origins, **_scores(outcome.metrics, run.headline)})
    costs = {scheme.name: parameters_per_task(sizes, scheme, len(learned)) for scheme in schemes}
    table = pd.DataFrame(rows)
    table["parameters"] = [costs.get(name, float(sum(sizes.values()))) for name in table["scheme"]]
    return table.assign(
        metric=run.headline,
        n=len(run.predictions["test"]["labels"]),
        tasks=len(learned),
        percent=100 * table["parameters"] / backbone,
        **{"with": ", ".join(sorted(set(learned) - {run.spec.task}))},
    )[COLUMNS]


def sharing_alike(run: Run, store: RunStore) -> pd.DataFrame:
    """`sharing` with only those tasks that have the same labels as that of `run`, under the schemes that share vectors.

    Schemes that do not depend on other tasks (own vectors, none) are in `sharing`.
    """
    labels = load_task(run.spec.task).labels
    others = {donor.spec.task for donor in donors(run, store)}
    alike = {task for task in others if labels and load_task(task).labels == labels}
    shared = [
        scheme
        for scheme in SCHEMES
        if "mean" in scheme.sources()[:2] or scheme.weight in ("others", "another")
    ]
    return sharing(run, store, tasks=alike, schemes=shared)


def _scores(metrics: Mapping[str, Mapping[str, float]], headline: str) -> dict[str, float]:
    held_out = metrics.get("validation", {}).get(headline, float("nan"))
    return {"score": metrics["test"][headline], "validation": held_out}


def _state(vectors: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, Tensor]:
    """Stacked vectors as a state: "adapter.layers.3.attention_output.weight" is row 3 of "attention_output.weight"."""
    state = {}
    for name in names:
        role, _, rest = name.partition(".layers.")
        if role in ("adapter", "norm"):
            layer, _, label = rest.partition(".")
            state[name] = torch.from_numpy(np.ascontiguousarray(vectors[label][int(layer)]))
    return state


def _draw(run: Run) -> int:
    """The seed of the other task and of the permutation: fixed for a run, and different between runs."""
    return int(run.key[:8], 16)
