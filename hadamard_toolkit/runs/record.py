"""A finished run in memory (`Run`) and its folder on disk: run.json, history.jsonl, adapter, predictions."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.paths import atomic_write
from hadamard_toolkit.runs.labels import describe, method_name
from hadamard_toolkit.runs.spec import RunSpec, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hadamard_toolkit.adapters.attachment import Attachment

SCHEMA = 1
RECORD, HISTORY, PREDICTIONS = "run.json", "history.jsonl", "predictions.safetensors"
ANSWERS = "answers.json"
ADAPTER = "adapter_model.safetensors"
KEPT = "kept"
KEEP = ("adapters", "vectors", "everything", "nothing")
NOT_KEPT = {
    "adapters": 'not kept: as large as the backbone; RunStore(folder, keep="everything") keeps them',
    "vectors": 'not kept: the store keeps vectors only; RunStore(folder, keep="adapters") keeps them',
    "nothing": 'not kept: the run was made for its scores; RunStore(folder, keep="adapters") keeps weights',
}


@dataclass
class Run:
    """One finished run.

    metrics: split -> metric -> value, in natural units (accuracy 0..1). headline: the task's own metric.
    history: one row per epoch and stage; names as in the Trainer's log.
    counts: index role; columns trained, stored, nonzero.
    times: seconds. info: `run_info`, `train_info` and `meta_info` of run.json, and `rows` per split.
    predictions: split -> {"logits": [rows, outputs], "labels": [rows], "rows": their positions in the split}, which
        is what paired tests and bootstraps over examples need. Of a span task, instead of logits, "span" [rows, 2]
        (where the predicted answer starts and ends in the context, in characters), its "score", and each metric row
        by row; "labels" [rows, 2] are then the places of the first true answer.
    answers: of a span task, split -> id of the question -> predicted answer; each split is a prediction file as SQuAD's
        official script reads it. Empty for other tasks.
    folder: where its files are, or None. store: the folder of its store, or None.
    attachment: the trained attachment, None when the run was read from a store.
    """

    spec: RunSpec
    metrics: dict[str, dict[str, float]]
    headline: str
    history: pd.DataFrame
    counts: pd.DataFrame
    times: dict[str, float]
    info: dict[str, Any]
    predictions: dict[str, dict[str, np.ndarray]] = field(repr=False)
    folder: Path | None = None
    attachment: Attachment | None = field(default=None, repr=False)
    store: Path | None = None
    answers: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def score(self) -> float:
        """The headline metric on the test split."""
        return self.metrics["test"][self.headline]

    def vectors(self) -> dict[str, np.ndarray]:
        """The trained vectors stacked over layers, as in `Attachment.vectors`; from a store no backbone is loaded."""
        return self.attachment.vectors() if self.attachment else stored_vectors(self._stored_folder())

    def restore(self, *, data: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Attachment]:
        """A fresh backbone with the stored adapter, norms and head: (model, tokenizer, attachment).

        A backbone that was pretrained further for the run comes from the cache, or is made again. Raises `DataError`
        where the weights were not kept (full fine-tuning), where that backbone is out of reach, and where backbone or
        data here are not those that the run was made from. With `data=False` the data are not compared.
        """
        from hadamard_toolkit.adapters.loading import load_attachment
        from hadamard_toolkit.backbones import load_backbone
        from hadamard_toolkit.runs.made_from import Here

        folder = _adapter_folder(self._stored_folder())
        task = self.info["meta_info"]["task"]
        Here().require_same(
            self.key, self.info["meta_info"], self.spec.backbone, self.spec.task if data else None
        )
        model, tokenizer = load_backbone(
            self.spec.backbone, labels=task["labels"], head=task["head"], seed=self.spec.seed
        )
        if steps := self.spec.protocol.pretraining:
            from hadamard_toolkit.training.continued_pretraining import adapt_again

            adapt_again(
                model, self.spec.backbone, self.spec.task, steps, self.info["meta_info"]["pretraining"]
            )
        with warnings.catch_warnings():
            # An older file knows only a part of its backbone; all of it was compared above.
            warnings.filterwarnings("ignore", message=".*was saved by an older version", category=UserWarning)
            return model, tokenizer, load_attachment(model, folder)

    def _stored_folder(self) -> Path:
        if self.folder is None:
            raise ArgumentError(
                "this run was not written to a store; use run(spec, store) to be able to load it again"
            )
        return self.folder

    def to_record(self) -> dict[str, Any]:
        """What run.json holds, as plain data."""
        record = {
            "schema": SCHEMA,
            "status": "done",
            "key": self.key,
            "spec": self.spec.to_dict(),
            "method": method_name(self.spec.adapter),
            "label": describe(self.spec),
            "headline": self.headline,
            "metrics": self.metrics,
            "counts": self.counts.to_dict(orient="index"),
            "times": self.times,
            **self.info,
        }
        return dict(_finite(record))


def write_run(run: Run, folder: Path, *, keep: str) -> None:
    """Write all files of `run` into the existing `folder`; `keep` is that of `RunStore`."""
    if run.attachment is None:
        raise ArgumentError("only a freshly trained run can be written; this one was read from a store")
    matrices = any(tensor.ndim > 1 for tensor in run.attachment.parameters("adapter"))
    left_out = {
        "adapters": whole_model(run.attachment),
        "vectors": matrices or whole_model(run.attachment),
        "everything": False,
        "nothing": True,
    }[keep]
    run.info["run_info"]["weights"] = NOT_KEPT[keep] if left_out else KEPT
    if not left_out:
        run.attachment.save(folder)
    elif run.attachment.masking is not None:
        from hadamard_toolkit.adapters.masking import write_masks

        write_masks(folder, run.attachment.masking.kept, run.attachment.masking.record)
    steps = [_without_gaps(row) for row in run.history.to_dict(orient="records")]
    lines = (json.dumps(_finite(step), allow_nan=False) + "\n" for step in steps)
    atomic_write(folder / HISTORY, "".join(lines))
    arrays = {
        f"{split}.{name}": np.ascontiguousarray(array)
        for split, part in run.predictions.items()
        for name, array in part.items()
    }
    save_file(arrays, folder / PREDICTIONS)
    if run.answers:
        atomic_write(folder / ANSWERS, json.dumps(run.answers, ensure_ascii=False, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner may read; a store is shared
    atomic_write(folder / RECORD, json.dumps(run.to_record(), indent=1, allow_nan=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The checked run.json of a run's folder; `DataError` says why a folder is none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no run: {RECORD} is missing") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{RECORD} in {folder} cannot be read: {error}") from None
    return check_record(record, folder)


def check_record(record: Any, folder: Path) -> dict[str, Any]:
    """`record`, if it can be the run.json of `folder`, whose name is the run's key; else a `DataError` says why not."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{RECORD} in {folder} has schema {schema!r}; this version reads schema {SCHEMA}")
    needed = ("key", "spec", "metrics", "counts", "times", "headline")
    if missing := [name for name in needed if name not in record]:
        raise DataError(f"{RECORD} in {folder} lacks {', '.join(map(repr, missing))}")
    if key_of(record["spec"]) != record["key"]:
        raise DataError(f"{RECORD} in {folder} was changed: its spec belongs to key {key_of(record['spec'])}")
    if record["key"] != folder.name:
        raise DataError(f"{folder} holds the run {record['key']}; the name of a run's folder is its key")
    if wrong := _wrong_value(record):
        raise DataError(f"{RECORD} in {folder} is damaged: {wrong}")
    return record


def _wrong_value(record: dict[str, Any]) -> str | None:
    """The first of a record's scores and times that is missing or no number, in words; None where all is well."""
    metrics, times = record["metrics"], record["times"]
    if not isinstance(metrics, dict) or not all(isinstance(values, dict) for values in metrics.values()):
        return "metrics is not a table of splits and metrics"
    if record["headline"] not in metrics.get("test", {}):
        return f"metrics has no test score {record['headline']!r}"
    for split, values in metrics.items():
        for name, value in values.items():
            if value is not None and not _is_number(value):
                return f"metrics has {split} {name}={value!r}, which is no number"
    if not isinstance(times, dict) or not _is_number(times.get("total")):
        return "times has no total in seconds"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(folder: Path) -> Run:
    """The run that `write_run` wrote, without its attachment."""
    record = read_record(folder)
    try:
        history = [json.loads(line) for line in (folder / HISTORY).read_text("utf-8").splitlines()]
        arrays = load_file(folder / PREDICTIONS)
        answers = json.loads((folder / ANSWERS).read_text("utf-8")) if (folder / ANSWERS).is_file() else {}
    except Exception as error:  # safetensors has an error class of its own
        raise DataError(f"the run in {folder} is damaged: {error}") from None
    predictions: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        split, _, kind = name.rpartition(".")
        predictions.setdefault(split, {})[kind] = array
    return Run(
        spec=RunSpec.from_dict(record["spec"]),
        metrics={
            split: {m: _number(v) for m, v in values.items()} for split, values in record["metrics"].items()
        },
        headline=record["headline"],
        history=pd.DataFrame(history),
        counts=pd.DataFrame.from_dict(record["counts"], orient="index").rename_axis("role"),
        times=record["times"],
        info={name: record.get(name, {}) for name in ("rows", "run_info", "train_info", "meta_info")},
        predictions=predictions,
        folder=folder,
        answers=answers,
    )


def is_subset(split: str, record: Mapping[str, Any]) -> bool:
    """Whether a score on `split` is one on less than the official data: `record` is run.json or `Run.info`.

    Fewer training rows by choice are in `train_rows`, and held-out rows are never all; neither counts here.
    """
    scored = record["rows"][split]
    capped = split.startswith("test") and scored["rows"] < scored["of"]
    return capped or bool(record["meta_info"]["task"].get("subset"))


def stored_vectors(folder: Path) -> dict[str, np.ndarray]:
    """`Attachment.vectors` of a stored run, from its files alone."""
    from hadamard_toolkit.adapters.files import read_config, read_state, stack_vectors

    config = read_config(_adapter_folder(folder))
    return stack_vectors(read_state(folder), config["backbone"]["layers"])


def _adapter_folder(folder: Path) -> Path:
    if not (folder / ADAPTER).is_file():
        weights = read_record(folder).get("run_info", {}).get("weights", "missing")
        raise DataError(f"the weights of run {folder.name} are {weights}")
    return folder


def whole_model(attachment: Attachment) -> bool:
    """Whether saving the attachment would save most of the backbone, as with full fine-tuning."""
    stored = int(attachment.count().drop(index="head")["stored"].sum())
    return 2 * stored > sum(p.numel() for p in attachment.model.base_model.parameters())


def _without_gaps(step: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of the history without the cells that its step did not log."""
    return {str(name): value for name, value in step.items() if not pd.isna(value)}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """Plain JSON data, with null where a number is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
