"""Runs that ask how many numbers a task needs: bases made of the runs of a store, and specs that train in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.bases import save_basis
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.subspace import Subspace
from hadamard_toolkit.adapters.tuning import HeadOnly, LayerNormTuning
from hadamard_toolkit.backbones import load_backbone
from hadamard_toolkit.errors import DataError, check_choice, check_whole
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.runs.record import KEPT
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.basis import (
    BASES,
    RUN,
    directions_of,
    means_of_others,
    permuted_like,
    random_like,
)
from hadamard_toolkit.training.protocol import Protocol

NORM_CHANGES = "norm changes"
KINDS = (*BASES, NORM_CHANGES)
DIGITS = 7  # kept of a direction, so that bases made on other machines of the kind are the same


@dataclass(frozen=True)
class _Source:
    """The runs of one adapter that directions come from."""

    adapter: Adapter
    specs: dict[str, list[RunSpec]]  # by task
    changes: pd.DataFrame  # θ − θ_0: index task, seed, key; columns vector, layer, coordinate


def subspace_plan(
    store: RunStore,
    tasks: Iterable[str],
    kinds: Sequence[str] = BASES,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Iterable[int] = (0, 1, 2),
    *,
    learning_rate: float,
    backbone: str = "minilm-l6",
) -> list[RunSpec]:
    """Save a basis per task, kind and seed, made of the runs of `store`, and give the specs that train in them.

    Directions come from the stored `Hadamard(norm=None)` runs on `backbone` (`"norm changes"`: of
    `LayerNormTuning(norm="both")`) with the protocol that has most seeds for their task, among equals the best score on
    the held-out rows. Per task they are the principal directions of a set of changes θ − θ_0 (b without its mean):

    - `"other tasks"`: the means over seeds of all tasks but this one and those that share texts with it;
    - `"permuted"`: these with the coordinates permuted within each layer; `"random"`: random ones with their norms;
      both drawn anew for every task and seed;
    - `"own seeds"`: the runs of the same task with other seeds than the one to be trained;
    - `"norm changes"`: the first, for both norms of every layer.

    All are orthonormal rows times the rms norm of the set, so that coefficients are of order 1. Where a basis has fewer
    than k directions, there is no run. Each task and seed also has `HeadOnly()`, which is k = 0. All runs have the
    protocol of the unshared runs, with `learning_rate` for the coefficients. Kind, tasks, scale and the keys of the
    runs stand in the files of the bases and in the records (`train_info["basis"]`).

    Raises `DataError` where the store lacks such runs of a task, `ArgumentError` for unknown kinds.
    """
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    for k in ks:
        check_whole("ks", k, least=1)
    vectors = _source(store, backbone, Hadamard(norm=None))
    norms = _source(store, backbone, LayerNormTuning(norm="both")) if NORM_CHANGES in kinds else vectors
    seeds, specs = list(seeds), []
    for task in tasks:
        if task not in vectors.specs:
            raise DataError(
                f"{store!r} has no runs of {label_of(vectors.adapter)} with weights on task={task!r}"
            )
        first = vectors.specs[task][0]
        specs += [replace(first, adapter=HeadOnly(), seed=seed) for seed in seeds]
        protocol = replace(first.protocol, learning_rate=learning_rate)
        for kind in kinds:
            source = norms if kind == NORM_CHANGES else vectors
            for seed in seeds:
                name, most = _saved(source, kind, task, seed)
                specs += [
                    replace(first, adapter=Subspace(source.adapter, name, k), protocol=protocol, seed=seed)
                    for k in ks
                    if k <= most
                ]
    return list(dict.fromkeys(specs))


def _source(store: RunStore, backbone: str, adapter: Adapter) -> _Source:
    """The kept runs of `adapter`, of each task those of one protocol, and what they changed."""
    by_task: dict[str, dict[Protocol, list[tuple[float, RunSpec]]]] = {}
    for key in store.load()["key"].unique():
        record = store.record(key)
        spec = RunSpec.from_dict(record["spec"])
        fits = spec.adapter == adapter and spec.backbone == backbone and spec.sparsity is None
        if fits and record["run_info"].get("weights") == KEPT and not spec.protocol.pretraining:
            # A correlation with one answer for all rows is not defined, and recorded as null.
            score = record["metrics"].get("validation", {}).get(record["headline"]) or 0.0
            by_task.setdefault(spec.task, {}).setdefault(spec.protocol, []).append((score, spec))
    if not by_task:
        raise DataError(f"{store!r} has no runs of {label_of(adapter)} on {backbone} with their weights")
    chosen = {task: [spec for _, spec in max(runs.values(), key=_worth)] for task, runs in by_task.items()}
    start = attach(load_backbone(backbone)[0], adapter).vectors()
    rows, index = [], []
    for task, specs in chosen.items():
        for spec in specs:
            rows.append(_change(store.vectors(spec.key), start))
            index.append((task, spec.seed, spec.key))
    columns = pd.MultiIndex.from_tuples(
        [(name, *place) for name, values in start.items() for place in np.ndindex(values.shape)],
        names=["vector", "layer", "coordinate"],
    )
    changes = pd.DataFrame(np.stack(rows), pd.MultiIndex.from_tuples(index, names=RUN), columns)
    return _Source(adapter, chosen, changes.sort_index())


def _worth(runs: list[tuple[float, RunSpec]]) -> tuple[int, float]:
    """How many runs a protocol has, and their mean score on the held-out rows."""
    return len(runs), float(np.mean([score for score, _ in runs]))


def _change(vectors: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> np.ndarray:
    """θ − θ_0 in float64 as one row. The norm behind W_O takes the mean of b away, so that it tells nothing."""
    moved = {name: vectors[name].astype(float) - start[name] for name in start}
    if "attention_output.bias" in moved:
        moved["attention_output.bias"] -= moved["attention_output.bias"].mean(axis=1, keepdims=True)
    return np.concatenate([values.ravel() for values in moved.values()])


def _saved(source: _Source, kind: str, task: str, seed: int) -> tuple[str, int]:
    """The name of a saved basis and how many directions it has; no name and 0 where there are no runs for it."""
    changes = source.changes
    tasks, seeds = (changes.index.get_level_values(level) for level in ("task", "seed"))
    generator = np.random.default_rng([crc32(task.encode()), seed])
    if kind == "own seeds":
        used = changes[(tasks == task) & (seeds != seed)]
        rows = used.to_numpy()
    else:
        means = means_of_others(changes, task)
        used, rows = changes[tasks.isin(means.index)], means.to_numpy()
    if not len(rows):
        return "", 0
    vectors, layers = (changes.columns.get_level_values(level) for level in ("vector", "layer"))
    if kind == "permuted":
        width = changes.columns.get_level_values("coordinate").nunique()
        rows = permuted_like(rows, layers.nunique(), width, generator)
    elif kind == "random":
        rows = random_like(rows, generator)
    scale = float(np.sqrt((rows**2).sum(axis=1).mean()))
    directions = directions_of(rows)
    # The sign of a singular vector is arbitrary.
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    directions = np.round(directions * np.sign(largest) * scale, DIGITS)
    name = save_basis(
        {
            f"layers.{layer}.{vector}": directions[:, (vectors == vector) & (layers == layer)]
            for vector in vectors.unique()
            for layer in layers.unique()
        },
        kind=kind,
        task=task,
        seed=seed if kind in ("own seeds", "permuted", "random") else None,
        scale=scale,
        directions=len(directions),
        adapter=label_of(source.adapter),
        tasks=sorted(set(used.index.get_level_values("task"))),
        sources=list(used.index.get_level_values("key")),
    )
    return name, len(directions)
