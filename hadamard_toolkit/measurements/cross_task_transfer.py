"""Transplants: the vectors that one task learned, in the model of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

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
from hadamard_toolkit.training.evaluation import open_accelerator, predict
from hadamard_toolkit.training.features import FeatureStore, feature_source, head_features, without_backbone
from hadamard_toolkit.training.splits import draw
from hadamard_toolkit.training.stages import Run as Training
from hadamard_toolkit.training.stages import Stage, train_stage
from hadamard_toolkit.training.task_types import Labelled

State = Mapping[str, Tensor]
NORMS = ("source", "target")
COLUMNS = ["kind", "source_task", "source_key", "source_seed", "norms", "head", "metric", "score", "n"]


def transplant(run: Run, store: RunStore, *, norms: tuple[str, ...] = ("source",)) -> pd.DataFrame:
    """Score of the task of `run` with its own Hadamard vectors, with those of other tasks, and with none.

    Columns: `kind`, `source_task`, `source_key`, `source_seed`, `norms`, `head`, `metric`, `score`, `n` (test rows).

    `kind`: `"own"`, the vectors of the run; `"none"`, the bare backbone; `"source"`, the vectors of another task's run
    in `store` (same backbone, adapter, protocol and seed; never two tasks that share texts, see `share_text`);
    `"permuted"`, those of the source with the coordinates of each layer permuted, the null: as far from the identity,
    in no learned direction.
    `norms`: `"source"`, the norms that were trained with the vectors come along; `"target"`, those of the run stay.
    `head`: `"own"`, the head of the run as it is; `"retrained"`, trained anew, from the run's first weights and on its
    training rows, on the features that the transplanted model gives, as stage one of the protocol does on the bare
    backbone. Own vectors with the own head are the run itself, and no vectors with a retrained head `HeadOnly`.

    Raises `UnsupportedError` for a run of another adapter or with masks, and for heads that read every token.
    """
    for choice in norms:
        check_choice("norms", choice, NORMS)
    if not isinstance(run.spec.adapter, Hadamard) or run.spec.sparsity is not None:
        raise UnsupportedError(
            f"transplant needs a Hadamard adapter without masks, and run {run.key} is not one"
        )
    target = _Target(run)
    rows = []
    for named, state in _candidates(run, store, target, norms):
        for head, score in target.scores(state).items():
            rows.append({**named, "head": head, "metric": run.headline, "score": score, "n": target.tests})
    return pd.DataFrame(rows, columns=COLUMNS)


def sources(run: Run, store: RunStore) -> list[Run]:
    """The runs whose vectors may be put into the model of `run`, by task; see `transplant`.

    Raises `DataError` for one that was made from other content than lies here now: another backbone of its name, say.
    """
    table = store.load()
    keys = table.loc[
        (table["backbone"] == run.spec.backbone)
        & (table["adapter"] == canonical_json(run.spec.to_dict()["adapter"]))
        & (table["protocol"] == canonical_json(run.spec.to_dict()["protocol"]))
        & (table["sparsity"] == "null")
        & (table["seed"] == run.spec.seed)
        & (table["task"] != run.spec.task),
        ["task", "key"],
    ].drop_duplicates()
    allowed = [
        key
        for task, key in sorted(keys.itertuples(index=False, name=None))
        if not share_text(task, run.spec.task)
    ]
    found = [store.run(key) for key in allowed]
    kept = [source for source in found if source.info["run_info"]["weights"] == KEPT]
    here = Here()
    for source in kept:
        store.check_unchanged(source.key, here=here)
    return kept


def _candidates(
    run: Run, store: RunStore, target: _Target, norms: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], State]]:
    own = {"kind": "own", "source_task": run.spec.task, "source_key": run.key, "source_seed": run.spec.seed}
    yield {**own, "norms": "source"}, target.own
    nobody = {"kind": "none", "source_task": None, "source_key": None, "source_seed": None}
    yield {**nobody, "norms": None}, target.identity
    for source in sources(run, store):
        learned = _vectors(read_state(source.folder))  # type: ignore[arg-type]  # it was read from a store
        named = {"source_task": source.spec.task, "source_key": source.key, "source_seed": source.spec.seed}
        # the same permutation wherever this source goes
        shuffled = _permuted(learned, target.identity, np.random.default_rng([0, int(source.key, 16)]))
        for kind, state in (("source", learned), ("permuted", shuffled)):
            for choice in norms:
                kept = {} if choice == "source" else _norms(target.own)
                yield {**named, "kind": kind, "norms": choice}, {**state, **kept}


def _vectors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(("adapter.", "norm."))}


def _norms(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("norm.")}


def _permuted(learned: State, identity: State, generator: np.random.Generator) -> dict[str, Tensor]:
    """The *change* of each layer with its coordinates permuted, all vectors of a layer alike."""
    orders: dict[tuple[str, int], Tensor] = {}
    found = {}
    for name, value in learned.items():
        place = name.split(".")[2], value.numel()  # "adapter.layers.3.attention_output.weight"
        if place not in orders:
            orders[place] = torch.from_numpy(generator.permutation(value.numel()))
        found[name] = identity[name] + (value - identity[name])[orders[place]]
    return found


class _Target:
    """The model, rows and head of the run that vectors are put into."""

    def __init__(self, run: Run) -> None:
        spec = run.spec
        self.run, self.task = run, load_task(spec.task)
        self.model, tokenizer, attachment = run.restore()
        everything = attachment.state_dict()
        self.own = _vectors(everything)
        self.own_head = {name: value for name, value in everything.items() if name.startswith("head.")}
        attachment.detach()  # which puts the head back to its first weights
        attachment = attach(self.model, spec.adapter, seed=spec.seed)
        everything = attachment.state_dict()
        self.identity = _vectors(everything)
        self.first_head = {name: value for name, value in everything.items() if name.startswith("head.")}
        attachment.detach()
        parts = draw(self.task.splits, spec.protocol, spec.seed)
        self.kind = Labelled(self.task.text_columns, tokenizer, spec.protocol)
        names = [name for name in ("train", "validation", "test") if name in parts]
        self.examples = {
            name: self.kind.encode(self.task.splits[parts[name].split].select(parts[name].rows))
            for name in names
        }
        self.tests = len(self.examples["test"])
        self.accelerator = open_accelerator(spec.protocol)
        self.model.to(self.accelerator.device)

    def scores(self, state: State) -> dict[str, float]:
        """The test score with these vectors merged into the backbone, by head."""
        attachment = attach(self.model, self.run.spec.adapter, seed=self.run.spec.seed)
        try:
            attachment.load_state_dict(dict(state))
            attachment.merge(allow_new_biases=True)  # it is never saved
            bare = attach(self.model, HeadOnly(), seed=self.run.spec.seed)
            try:
                return self._scores(bare)
            finally:
                bare.detach()
        finally:
            attachment.detach()

    def _scores(self, bare: Attachment) -> dict[str, float]:
        protocol, store = self.run.spec.protocol, FeatureStore()
        data = {}
        for name, examples in self.examples.items():
            vectors = head_features(
                bare, examples, self.kind.collate, self.accelerator, protocol.eval_batch_size, store
            )
            data[name] = feature_source(self.model, vectors, examples.labels)
        training = Training(
            bare, self.accelerator, protocol, self.kind, (self.run.headline,), self.run.spec.seed
        )
        stage = Stage(1, "stage_one", ("head",), protocol.head_learning_rate, protocol.head_epochs)
        found = {}
        with without_backbone(self.model):
            for head in ("own", "retrained"):
                bare.load_state_dict(self.own_head if head == "own" else self.first_head)
                if head == "retrained":
                    train_stage(training, stage, data["train"], data.get("validation"))
                logits = predict(self.accelerator, self.model, data["test"], protocol.eval_batch_size)
                score = self.kind.score((self.run.headline,), logits, self.examples["test"])
                found[head] = score[self.run.headline]
        return found
