"""Cross-task transfer: the vectors that one task learned, in the model of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hadamard_toolkit.adapters.attachment import Attachment, attach
from hadamard_toolkit.adapters.files import read_state
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.tuning import HeadOnly
from hadamard_toolkit.errors import UnsupportedError, check_choice
from hadamard_toolkit.runs.made_from import Here
from hadamard_toolkit.runs.record import KEPT, Run
from hadamard_toolkit.runs.spec import canonical_json
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.similarity import share_text
from hadamard_toolkit.tasks.registry import load_task
from hadamard_toolkit.training.evaluation import open_accelerator
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.loop import Outcome, train
from hadamard_toolkit.training.task_types import Labelled

State = Mapping[str, Tensor]
NORMS = ("source", "target")
COLUMNS = ["kind", "source_task", "source_key", "source_seed", "norms", "head", "metric", "score", "n"]


def transplant(run: Run, store: RunStore, *, norms: tuple[str, ...] = ("source",)) -> pd.DataFrame:
    """Score of the task of `run` with its own Hadamard vectors, with those of other tasks, and with none.

    Columns: `kind`, `source_task`, `source_key`, `source_seed`, `norms`, `head`, `metric`, `score`, `n` (test rows).

    `kind`: `"own"`, the vectors of the run; `"none"`, the bare backbone; `"source"`, the vectors of a donor, which is
    the run of another task (see `donors`); `"permuted"`, those of the donor with the coordinates of each layer
    permuted. This is the null: as far from the identity, in no learned direction.
    `norms`: `"source"`, the norms that were trained with the vectors come along; `"target"`, those of the run stay.
    `head`: `"own"`, the head of the run as it is; `"retrained"`, a head trained on the model with these vectors, as
    `retrain_head` says. Own vectors with the own head are the run itself; no vectors with a retrained head are
    `HeadOnly`.

    Raises `UnsupportedError` for a run of another adapter, with masks, or of a span task.
    """
    for choice in norms:
        check_choice("norms", choice, NORMS)
    check_hadamard(run, "transplant")
    task, protocol = load_task(run.spec.task), run.spec.protocol
    model, tokenizer, attachment = run.restore()
    trained = attachment.state_dict()
    attachment.detach()
    fresh = attach(model, run.spec.adapter, seed=run.spec.seed)
    identity = fresh.state_dict()
    fresh.detach()
    kind, accelerator = Labelled(task.text_columns, tokenizer, protocol), open_accelerator(protocol)
    tests = kind.encode(task.splits["test"].select(run.predictions["test"]["rows"]))
    rows = []
    for named, vectors in _candidates(run, store, _vectors(trained), _vectors(identity), norms):
        with merged(model, run, vectors) as bare:
            outcome = retrain_head(bare, run, tokenizer)
            bare.load_state_dict({name: value for name, value in trained.items() if name.startswith("head.")})
            logits = kind.predict(accelerator, model, kind.source(tests), protocol.eval_batch_size)
        own = kind.score((run.headline,), logits, tests)
        for head, scores in (("own", own), ("retrained", outcome.metrics["test"])):
            rows.append({**named, "head": head, "metric": run.headline, "score": scores[run.headline]})
    return pd.DataFrame(rows).assign(n=len(tests))[COLUMNS]


def donors(run: Run, store: RunStore) -> list[Run]:
    """The runs whose vectors may be put into the model of `run`, ordered by task.

    They have the same backbone, adapter, protocol and seed, and another task that shares no texts with that of `run`
    (see `share_text`). Raises `DataError` for one that was made from other content than is here now, such as another
    backbone of the same name.
    """
    table = store.load()
    record = run.spec.to_dict()
    alike = table[
        (table["backbone"] == run.spec.backbone)
        & (table["adapter"] == canonical_json(record["adapter"]))
        & (table["protocol"] == canonical_json(record["protocol"]))
        & (table["sparsity"] == "null")
        & (table["seed"] == run.spec.seed)
        & (table["task"] != run.spec.task)
    ].drop_duplicates("key")
    ordered = alike[["task", "key"]].sort_values(["task", "key"]).itertuples(index=False, name=None)
    others = [store.run(key) for task, key in ordered if not share_text(task, run.spec.task)]
    kept = [other for other in others if other.info["run_info"]["weights"] == KEPT]
    here = Here()
    for other in kept:
        store.check_unchanged(other.key, here=here)
    return kept


def check_hadamard(run: Run, measurement: str) -> None:
    """Raise `UnsupportedError` unless `run` trained a Hadamard adapter without masks on a task with labels."""
    if not isinstance(run.spec.adapter, Hadamard) or run.spec.sparsity is not None:
        raise UnsupportedError(
            f"{measurement} needs a Hadamard adapter without masks, and run {run.key} is not one"
        )
    if run.info["meta_info"]["task"]["head"] == "span":
        raise UnsupportedError(
            f"{measurement} does classification and regression, and {run.spec.task!r} has spans"
        )


@contextmanager
def merged(model: PreTrainedModel, run: Run, vectors: State) -> Iterator[Attachment]:
    """Inside the block `vectors` are part of the backbone `model`; yields its head, as `HeadOnly`.

    Afterwards the model is as it was.
    """
    holder = attach(model, run.spec.adapter, seed=run.spec.seed)
    try:
        holder.load_state_dict(dict(vectors))
        holder.merge(allow_new_biases=True)  # it is never saved
        bare = attach(model, HeadOnly(), seed=run.spec.seed)
        try:
            yield bare
        finally:
            bare.detach()
    finally:
        holder.detach()


def retrain_head(
    bare: Attachment,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    *,
    feature_store: FeatureStore | None = None,
) -> Outcome:
    """Train the head alone, from the first weights of `run`, as stage one of its protocol does.

    The rows are those of `run`: trained on its training rows, selected on its held-out rows, scored on its test rows.
    """
    protocol = replace(run.spec.protocol, head="first-then-frozen", pretraining=())
    task = load_task(run.spec.task)
    return train(bare, task, tokenizer, protocol, seed=run.spec.seed, feature_store=feature_store)


def _candidates(
    run: Run, store: RunStore, own: State, identity: State, norms: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], State]]:
    """The first columns of a row, and the vectors and norms that it is about."""
    source = {"source_task": run.spec.task, "source_key": run.key, "source_seed": run.spec.seed}
    yield {"kind": "own", **source, "norms": "source"}, own
    yield {"kind": "none", **dict.fromkeys(source), "norms": None}, identity
    kept_norms = {name: value for name, value in own.items() if name.startswith("norm.")}
    for donor in donors(run, store):
        learned = _vectors(read_state(donor.folder))  # type: ignore[arg-type]  # it was read from a store
        source = {"source_task": donor.spec.task, "source_key": donor.key, "source_seed": donor.spec.seed}
        # the same permutation wherever this donor goes
        permuted = _permuted(learned, identity, np.random.default_rng([0, int(donor.key, 16)]))
        for kind, vectors in (("source", learned), ("permuted", permuted)):
            for choice in norms:
                replaced = kept_norms if choice == "target" else {}
                yield {"kind": kind, **source, "norms": choice}, {**vectors, **replaced}


def _vectors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(("adapter.", "norm."))}


def _permuted(learned: State, identity: State, generator: np.random.Generator) -> dict[str, Tensor]:
    """The *change* of each layer with its coordinates permuted, all vectors of a layer alike."""
    orders: dict[tuple[str, int], Tensor] = {}
    permuted = {}
    for name, value in learned.items():
        layer = name.split(".")[2], value.numel()  # "adapter.layers.3.attention_output.weight"
        if layer not in orders:
            orders[layer] = torch.from_numpy(generator.permutation(value.numel()))
        permuted[name] = identity[name] + (value - identity[name])[orders[layer]]
    return permuted
