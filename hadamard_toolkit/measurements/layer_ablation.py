"""Layer ablation: the score of a trained Hadamard run when some of its layers are removed after training."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError, check_range
from hadamard_toolkit.studies.layer_ablation import layer_importance, taylor_scores, write_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hadamard_toolkit.adapters.attachment import Attachment
    from hadamard_toolkit.runs.record import Run
    from hadamard_toolkit.runs.store import RunStore
    from hadamard_toolkit.tasks.base import Task
    from hadamard_toolkit.training.batching import Examples
    from hadamard_toolkit.training.task_types import Labelled

MOST_LAYERS = 6  # up to here every subset is scored: 2 ** 6 = 64
TEST_ROWS = 400  # of the run's test rows, drawn once for all runs of a task
RANDOM_SUBSETS = 20  # of each of two sizes, where not every subset is scored
TAYLOR_ROWS = 128
Kept = tuple[int, ...]


def removal(run: Run, store: RunStore | None = None) -> pd.DataFrame:
    """The score of a stored Hadamard run with only some layers kept, on held-out and test rows; nothing is retrained.

    A removed layer has the backbone's values: W = 1, b = 0 and its norm as before training. Up to 6 layers every subset
    is scored. Beyond, the test rows are scored with: all layers but one, the first k and the last k, the k layers that
    moved most (`studies.layer_importance`), the path of greedy backward elimination, and 20 random subsets of half and
    of two thirds of the layers, the same for all runs; the held-out rows only with the candidates of the greedy path.
    At most 400 test rows are scored, the same for all runs of a task. Computed in float32, whatever the run trained in.

    One row per subset and split: `kept` ("0,1,5"), `split` ("validation" or "test"), `score` (the task's metric),
    `loss`, `n` (rows), `drawn` ("all", "random" or "rule"), `changed` (predictions that differ from those with all
    layers) and `correct` (which rows are right, in the order of `run.predictions[split]["rows"]`, as packed bits in
    hex). The last two are empty for regression.

    Raises `UnsupportedError` for runs of other methods, `DataError` for one without held-out rows.
    """
    task, tokenizer, attachment, layers = _restored(run)
    everything = tuple(layers)
    splits = {name: _Split(run, name, task, tokenizer, attachment) for name in ("validation", "test")}
    full = {name: split.cache.logits(everything) for name, split in splits.items()}
    rows: dict[tuple[str, Kept], dict[str, Any]] = {}

    def score(name: str, kept: Kept, drawn: str) -> dict[str, Any]:
        if (name, kept) not in rows:
            rows[name, kept] = {
                "kept": write_kept(kept),
                "split": name,
                **splits[name].row(kept, full[name]),
                "drawn": drawn,
            }
        return rows[name, kept]

    if every_subset := len(layers) <= MOST_LAYERS:
        chosen = dict.fromkeys(_subsets(layers), "all")
    else:
        rules = (*_by_position(layers), *_by_norm(attachment, layers), *_greedy(layers, score))
        chosen = dict.fromkeys(rules, "rule")
        chosen |= dict.fromkeys(_random_subsets(layers), "random")
    for kept in sorted(chosen, key=lambda kept: [layer in kept for layer in layers], reverse=True):
        for name in splits:
            if every_subset or name == "test" or kept == everything:
                score(name, kept, chosen[kept])["drawn"] = chosen[kept]
    columns = ["kept", "split", "score", "loss", "n", "drawn", "changed", "correct"]
    return pd.DataFrame(rows.values(), columns=columns)


def taylor(run: Run, store: RunStore | None = None) -> pd.DataFrame:
    """First-order Taylor and diagonal Fisher scores of the layers of a stored Hadamard run, on its held-out rows.

    One row per layer: `layer`, `taylor`, `increase`, `fisher` and `n`, the number of rows (at most 128); see
    `studies.taylor_scores`. The parameters of a layer are its W, b and trained norm.
    """
    task, tokenizer, attachment, layers = _restored(run)
    kind, examples = _rows(run, "validation", task, tokenizer)
    examples = examples.select(range(min(TAYLOR_ROWS, len(examples))))
    gradients: dict[str, list[np.ndarray]] = {}
    for row in range(len(examples)):
        for name, gradient in _gradients(attachment, kind, examples, row).items():
            gradients.setdefault(name, []).append(gradient)
    change = _change(attachment)
    scores = []
    for layer in layers:
        own = [name for name in change if f".layers.{layer}." in name]
        by_row = np.concatenate([np.stack(gradients[name]) for name in own], axis=1)
        moved = np.concatenate([change[name] for name in own])
        scores.append(taylor_scores(by_row[:, None], moved[None]).assign(layer=layer))
    return pd.concat(scores, ignore_index=True)


def _restored(run: Run) -> tuple[Task, PreTrainedTokenizerBase, Attachment, list[int]]:
    """Task, tokenizer, the trained attachment in evaluation mode, and the layers that carry an adapter."""
    from hadamard_toolkit.adapters.hadamard import Hadamard
    from hadamard_toolkit.tasks.registry import load_task

    if not isinstance(run.spec.adapter, Hadamard):
        raise UnsupportedError(
            f"run {run.key} trained {run.spec.adapter}; layers of Hadamard runs are removed"
        )
    task = load_task(run.spec.task)
    if task.kind == "span":
        raise UnsupportedError(
            f"task {task.name!r} is of kind 'span'; removal does classification and regression"
        )
    model, tokenizer, attachment = run.restore()
    model.eval()
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[arg-type]  # transformers wraps `to`
    return task, tokenizer, attachment, attachment.sites.layers(run.spec.adapter.layers)


def _rows(run: Run, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[Labelled, Examples]:
    """The rows of part `name` as the run predicted them, tokenised; of the test rows at most `TEST_ROWS`."""
    from hadamard_toolkit.training.splits import draw
    from hadamard_toolkit.training.task_types import Labelled

    parts = draw(task.splits, run.spec.protocol, run.spec.seed)
    if name not in parts or name not in run.predictions:
        raise DataError(
            f"run {run.key} has no {name} rows; layers are chosen on held-out rows: validation_rows > 0"
        )
    stored = run.predictions[name]["rows"]
    if not np.array_equal(parts[name].rows, stored):
        raise DataError(
            f"the {name} rows of task {task.name!r} are not those that run {run.key} was scored on"
        )
    kind = Labelled(task.text_columns, tokenizer, run.spec.protocol)
    positions = stored[scored_rows(len(stored))] if name == "test" else stored
    return kind, kind.encode(task.splits[parts[name].split].select(positions))


def scored_rows(available: int) -> np.ndarray:
    """Which of `available` test rows `removal` scores: their positions among them, ascending."""
    check_range("available", available, least=1)
    return np.sort(np.random.default_rng([0, 4]).permutation(available)[:TEST_ROWS])


class _Split:
    """The rows of one split, ready to be scored under any subset of layers."""

    def __init__(
        self, run: Run, name: str, task: Task, tokenizer: PreTrainedTokenizerBase, attachment: Attachment
    ) -> None:
        from hadamard_toolkit.measurements.layer_cache import LayerCache
        from hadamard_toolkit.training.evaluation import inputs_of

        kind, examples = _rows(run, name, task, tokenizer)
        everything = kind.collate(examples.__getitems__(range(len(examples))))
        self.cache = LayerCache(attachment, inputs_of(everything))
        self.labels, self.metric = examples.labels, task.metric

    def row(self, kept: Collection[int], full: np.ndarray) -> dict[str, Any]:
        """What `removal` says of one subset."""
        from hadamard_toolkit.training.evaluation import score

        logits = self.cache.logits(kept)
        scores = score((self.metric,), logits, self.labels)
        told: dict[str, Any] = {"changed": None, "correct": None}
        if self.labels.dtype.kind != "f":
            predicted = logits.argmax(axis=1)
            correct = np.packbits(predicted == self.labels).tobytes().hex()
            told = {"changed": int((predicted != full.argmax(axis=1)).sum()), "correct": correct}
        return {"score": scores[self.metric], "loss": round(scores["loss"], 6), "n": len(self.labels), **told}


def _subsets(layers: Sequence[int]) -> Iterator[Kept]:
    for size in range(len(layers) + 1):
        yield from itertools.combinations(layers, size)


def _random_subsets(layers: Sequence[int]) -> list[Kept]:
    """The same for every run of a depth; no subset twice."""
    generator = np.random.default_rng([len(layers), 5])
    found: dict[Kept, None] = {}
    for size in (len(layers) // 2, round(2 * len(layers) / 3)):
        wanted = len(found) + RANDOM_SUBSETS
        while len(found) < wanted:
            found[tuple(sorted(generator.choice(layers, size, replace=False).tolist()))] = None
    return list(found)


def _by_position(layers: Sequence[int]) -> list[Kept]:
    """All, all but one, and the first or last k of them."""
    everything = tuple(layers)
    without_one = [tuple(kept for kept in layers if kept != layer) for layer in layers]
    ends = [part for k in range(len(layers)) for part in (everything[:k], everything[k:])]
    return list(dict.fromkeys([everything, *without_one, *ends]))


def _by_norm(attachment: Attachment, layers: Sequence[int]) -> list[Kept]:
    """The k layers whose W and b moved most, for every k."""
    state = {
        name: value.float().cpu().numpy()
        for name, value in attachment.state_dict().items()
        if name.startswith("adapter.")
    }
    vectors = {
        vector: np.stack([value for name, value in state.items() if name.endswith(f".{vector}")])
        for vector in ("weight", "bias")
        if any(name.endswith(f".{vector}") for name in state)
    }
    norms = layer_importance(vectors)
    told = norms[norms["vector"] == ("both" if len(vectors) == 2 else next(iter(vectors)))]
    order = [layers[place] for place in told.sort_values("l2", kind="stable")["layer"]]
    return [tuple(sorted(order[gone:])) for gone in range(len(order))]


def _greedy(layers: Sequence[int], score: Any) -> list[Kept]:
    """The path of backward elimination on held-out rows; ties go to the smaller loss."""
    path = [tuple(layers)]
    while path[-1]:
        candidates = [tuple(kept for kept in path[-1] if kept != layer) for layer in path[-1]]
        rows = {kept: score("validation", kept, "rule") for kept in candidates}
        path.append(max(candidates, key=lambda kept: (rows[kept]["score"], -rows[kept]["loss"])))
    return path


def _gradients(attachment: Attachment, kind: Labelled, examples: Examples, row: int) -> dict[str, np.ndarray]:
    """The gradient of one row's loss by name of an adapter's or norm's parameter, float64."""
    from hadamard_toolkit.training.evaluation import inputs_of

    device = next(attachment.model.parameters()).device
    batch = {key: value.to(device) for key, value in kind.collate(examples.__getitems__([row])).items()}
    named = {**attachment.named_parameters("adapter"), **attachment.named_parameters("norm")}
    logits = attachment.model(**inputs_of(batch)).logits.float()
    labels = batch["labels"]
    if labels.is_floating_point():
        loss = functional.mse_loss(logits[:, 0], labels.float())
    else:
        loss = functional.cross_entropy(logits, labels)
    found = torch.autograd.grad(loss, list(named.values()))
    return {name: value.double().cpu().numpy() for name, value in zip(named, found, strict=True)}


def _change(attachment: Attachment) -> dict[str, np.ndarray]:
    """Trained minus backbone value by name: W − 1, b, and what the norms moved."""
    trained = attachment.state_dict()
    with attachment.enabled(False):
        before = attachment.state_dict()
    if any(not name.startswith(("adapter.", "norm.", "head.")) for name in trained):
        raise ArgumentError(f"{attachment.adapter} has parameters that removal does not know")
    identity = {name: torch.full_like(trained[name], float(name.endswith(".weight"))) for name in trained}
    change = {
        name: trained[name] - (identity[name] if name.startswith("adapter.") else before[name])
        for name in trained
        if not name.startswith("head.")
    }
    return {name: value.double().numpy() for name, value in change.items()}
