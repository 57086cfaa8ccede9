"""One set of Hadamard vectors for several tasks: what is left of a run's score."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.adapters.files import stack_vectors
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.tuning import HeadOnly
from hadamard_toolkit.errors import DataError, UnsupportedError
from hadamard_toolkit.measurements.cross_task_transfer import sources
from hadamard_toolkit.paths import cache_folder
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.sharing import (
    BARE,
    PARTS,
    SCHEMES,
    UNSHARED,
    Scheme,
    combine,
    parameters_per_task,
    part_of,
)
from hadamard_toolkit.tasks.registry import load_task
from hadamard_toolkit.training.features import FeatureStore
from hadamard_toolkit.training.loop import train

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

    The vectors of each scheme (see `studies.sharing.Scheme`) go into the pretrained backbone and stay; a fresh head is
    trained on them as stage one of the protocol trains it, on the training rows of `run`, selected on its held-out rows
    and scored on its test rows. Shared with: the runs of the same backbone, adapter, protocol and seed on other tasks,
    or on those in `tasks`; never on a task that has texts in common. The row `"unshared"` is `run` itself.

    Columns: `scheme`, `weight`, `bias`, `norm` (where each comes from), `metric`, `score` and `validation` (in natural
    units), `n` (test rows), `tasks` (how many share, this one included), `with` (the others), `parameters` per task
    (heads left out; shared ones divided by `tasks`) and `percent` (of the backbone).

    Raises `UnsupportedError` for a run of another adapter or a span task, `DataError` where there is nobody to share
    with.
    """
    if not isinstance(run.spec.adapter, Hadamard) or run.spec.sparsity is not None:
        raise UnsupportedError(
            f"sharing needs a Hadamard adapter without masks, and run {run.key} is not one"
        )
    others = [one for one in sources(run, store) if tasks is None or one.spec.task in tasks]
    if not others:
        raise DataError(f"the store has no run like {run.key} on another task, of the same protocol and seed")
    learned = {one.spec.task: one.vectors() for one in (run, *others)}
    model, tokenizer, attachment = run.restore()
    attachment.detach()
    fresh = attach(model, run.spec.adapter, seed=run.spec.seed)
    identity = stack_vectors(fresh.state_dict(), len(fresh.sites))
    fresh.detach()
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    sizes = {
        part: sum(int(np.isfinite(a).sum()) for name, a in identity.items() if part_of(name) == part)
        for part in PARTS
    }
    rows = [{"scheme": UNSHARED, **dict.fromkeys(PARTS, "own"), **_scores(run.metrics, run.headline)}]
    task = load_task(run.spec.task)
    protocol = replace(run.spec.protocol, head="first-then-frozen", pretraining=())
    for scheme in schemes:
        vectors = combine(learned, run.spec.task, scheme, identity, seed=_draw(run))
        holder = attach(model, run.spec.adapter, seed=run.spec.seed)
        holder.load_state_dict(_state(vectors, holder.named_parameters()))
        holder.merge(allow_new_biases=True)  # it is never saved
        bare = attach(model, HeadOnly(), seed=run.spec.seed)
        # Of the bare backbone the cache has them, and needs them; the others are seen once, and would fill it.
        features = FeatureStore(cache_folder() / "features" if scheme.name == BARE else None)
        outcome = train(bare, task, tokenizer, protocol, seed=run.spec.seed, feature_store=features)
        bare.detach()
        holder.detach()
        told = dict(zip(PARTS, scheme.sources(), strict=True))
        rows.append({"scheme": scheme.name, **told, **_scores(outcome.metrics, run.headline)})
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

    What does not depend on whom one shares with (own vectors, none) is in `sharing`.
    """
    labels = load_task(run.spec.task).labels
    others = {one.spec.task for one in sources(run, store)}
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


def _state(vectors: Mapping[str, np.ndarray], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacked vectors as a state: "adapter.layers.3.attention_output.weight" is row 3 of "attention_output.weight"."""
    state = {}
    for name in named:
        role, _, rest = name.partition(".layers.")
        if role in ("adapter", "norm"):
            layer, _, label = rest.partition(".")
            state[name] = torch.from_numpy(np.ascontiguousarray(vectors[label][int(layer)]))
    return state


def _draw(run: Run) -> int:
    """What draws the other task and the permutation: another number for every run, the same whenever it is measured."""
    return int(run.key[:8], 16)
