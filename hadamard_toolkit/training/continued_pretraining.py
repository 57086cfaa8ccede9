"""Continued pretraining on domain or task text (DAPT, TAPT; Gururangan et al. 2020), done once and kept by content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.adapters.tuning import FullFineTuning
from hadamard_toolkit.backbones import load_backbone
from hadamard_toolkit.downloads import file_sha256, locked
from hadamard_toolkit.errors import ArgumentError, DataError, ToolkitError
from hadamard_toolkit.paths import atomic_folder, atomic_write, cache_folder
from hadamard_toolkit.sites import head_parameters
from hadamard_toolkit.tasks import TASKS, Task, load_task
from hadamard_toolkit.tasks.base import in_memory, is_test
from hadamard_toolkit.tasks.registry import canonical
from hadamard_toolkit.training.batching import Source
from hadamard_toolkit.training.evaluation import device_name, everywhere, open_accelerator
from hadamard_toolkit.training.masked_lm import MaskedText
from hadamard_toolkit.training.pretraining_step import TASK, ContinuedPretraining
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.stages import Stage, TrainingState, train_stage

FORMAT = 1  # raise it when the same step would give other weights
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000  # texts that only measure the loss
WEIGHTS, RECORD = "model.safetensors", "record.json"
# The text of a domain is the training text of these tasks.
CORPORA: dict[str, tuple[str, ...]] = {
    "biomed": ("chemprot",),
    "cs": ("acl-arc", "scierc"),
    "news": ("agnews", "hyperpartisan"),
    "reviews": ("imdb",),
    "embedded/tweets": ("embedded/tweets-intensity",),
    "embedded/movies": ("embedded/movies-intensity",),
    "embedded/products": ("embedded/products-intensity",),
    "embedded/editorials": ("embedded/editorials-intensity",),
}
FRESH_HEAD = (
    "the checkpoint has no masked-LM head: the output layer is tied to the word embeddings, and the transform before "
    "it was fresh, so loss_before is that of a fresh transform"
)


@dataclass(frozen=True)
class Corpus:
    """Different texts to train on and to measure on; `record` says where they come from."""

    texts: list[str]
    held_out: list[str]
    record: dict[str, Any]


def adapt(
    model: PreTrainedModel,
    backbone: str,
    task: Task,
    steps: Sequence[ContinuedPretraining],
    *,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Continue pretraining `backbone` by `steps` and put the result into `model`, which was loaded from it.

    Every parameter of the base model that masked-language modelling reads is replaced (a pooler is not read, and
    stays); the head of `model` is left as it is. Call this before `attach`. The result of a step is kept in `folder`
    (`pretraining/` in the cache) under a key of backbone, tokenizer, text and settings: the next run with this step,
    whatever its method and seed, reads it and trains nothing.

    Returns a JSON-able record per step: `text`, `origin` (tasks, sources and files), `rows`, `held_out_rows`, `tokens`
    and `sha256` of the text, `test_texts_dropped`, mean masked-LM loss on the held-out text `loss_before` and
    `loss_after`, `updates`, `fresh_head`, `note`, `settings`, `key`, `device`, `seconds` and `reused`.
    Raises `UnsupportedError` for an architecture without a masked-LM head, `ArgumentError` for an unknown text or a
    tokenizer without a mask token, `DataError` for text that is missing.
    """
    folder = folder or cache_folder() / "pretraining"
    key, previous, records = "", None, []
    for step in steps:
        corpus = gather(step, task)
        key = _key(key or _start(model, backbone), step, corpus)
        # Processes of one launch train together; a lock would make them wait for each other.
        accelerator = open_accelerator(_protocol(step))
        alone = accelerator.num_processes == 1
        with locked(folder / key, ready=(folder / key / RECORD).is_file()) if alone else nullcontext():
            record = _read_record(folder / key)
            reused = everywhere(accelerator, record is not None)
            if not reused:
                with torch.enable_grad():  # a run may be restored where gradients are off
                    record = _pretrain(backbone, step, corpus, key, previous, folder, accelerator)
        assert record is not None
        # The kept record may be of the same text under another name.
        records.append({**record, **corpus.record, "settings": step.to_dict(), "reused": reused})
        previous = folder / key
    if previous is not None:
        put_into(model, previous)
    return records


def adapt_again(
    model: PreTrainedModel,
    backbone: str,
    task: str,
    steps: Sequence[ContinuedPretraining],
    records: Sequence[dict[str, Any]],
    *,
    folder: Path | None = None,
) -> None:
    """Give `model` the weights that the `records` of `adapt` describe: from the cache, else by repeating the steps.

    Raises `DataError` where neither is possible, or where the text is no longer the recorded one.
    """
    folder = folder or cache_folder() / "pretraining"
    key = records[-1]["key"] if records else ""
    if key and _read_record(folder / key) is not None:
        put_into(model, folder / key)
        return
    try:
        again = adapt(model, backbone, load_task(task), steps, folder=folder)
    except ToolkitError as error:
        raise DataError(
            f"the backbone after pretraining (key {key}) is not in {folder}, and cannot be made again: {error}"
        ) from error
    if again[-1]["key"] != key:
        raise DataError(
            f"the backbone after pretraining (key {key}) is not in {folder}, and made again it has key "
            f"{again[-1]['key']}: backbone or text are not those that the run was trained on"
        )


def gather(step: ContinuedPretraining, task: Task) -> Corpus:
    """The text of `step`, drawn with its seed: different training texts, none of which is also a test text of `task`.

    Each column of a pair counts as a text. A twentieth of the texts (at most 1,000) only measures the loss.
    """
    tasks = [task] if step.text == TASK else [load_task(name) for name in tasks_of(step.text)]
    tested = {text for split, rows in task.splits.items() if is_test(split) for text in _texts(task, rows)}
    everything = dict.fromkeys(text for source in tasks for text in _texts(source, source.splits["train"]))
    texts = [text for text in everything if text not in tested]
    if len(texts) < 2:
        raise DataError(f"text={step.text!r} has {len(texts)} texts that are not test texts; two are needed")
    wanted = len(texts) if step.rows is None else min(step.rows, len(texts))
    held_out = max(1, min(HELD_OUT_MOST, int(HELD_OUT_SHARE * wanted)))
    shuffled = [texts[row] for row in np.random.default_rng(step.seed).permutation(len(texts))]
    measured, trained = shuffled[:held_out], shuffled[held_out:][:wanted]
    record = {
        "text": step.text,
        "origin": [
            {"task": source.name, **{key: source.provenance.get(key) for key in ("source", "files", "note")}}
            for source in tasks
        ],
        "rows": len(trained),
        "held_out_rows": len(measured),
        "sha256": _sha256(trained),
        "held_out_sha256": _sha256(measured),
        "test_texts_dropped": len(everything) - len(texts),
    }
    return Corpus(trained, measured, record)


def put_into(model: PreTrainedModel, folder: Path) -> None:
    """Copy the base model's weights that `adapt` kept in `folder` into `model`."""
    state = load_file(folder / WEIGHTS)
    state = {name.removeprefix("base."): value for name, value in state.items() if name.startswith("base.")}
    parameters = dict(model.base_model.named_parameters())
    unknown = [
        name for name, t in state.items() if name not in parameters or parameters[name].shape != t.shape
    ]
    missing = [name for name in parameters if name not in state and "pooler" not in name.split(".")]
    if unknown or missing:
        raise DataError(
            f"the weights in {folder} do not fit {type(model).__name__}: {(unknown or missing)[0]!r}"
        )
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def tasks_of(text: str) -> tuple[str, ...]:
    """The tasks whose training texts `text` names: those of a domain, or one task."""
    if text in CORPORA:
        return CORPORA[text]
    try:
        return (canonical(text),)
    except ArgumentError:
        domains = ", ".join(map(repr, (TASK, *CORPORA)))
        raise ArgumentError(
            f"text={text!r} is not allowed; choose one of {domains}, or a task ({', '.join(TASKS)})"
        ) from None


def _texts(task: Task, rows: Any) -> list[str]:
    return [text.strip() for column in task.text_columns for text in rows[column] if text.strip()]


def _sha256(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def _start(model: PreTrainedModel, backbone: str) -> str:
    """Hash of the base model's weights that masked-language modelling reads, and of the backbone's name (for the
    tokenizer)."""
    digest = hashlib.sha256(Path(backbone).name.encode())
    for name, parameter in sorted(model.base_model.named_parameters()):
        if "pooler" not in name.split("."):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(before: str, step: ContinuedPretraining, corpus: Corpus) -> str:
    """16 hex digits. The name of the text is not part of it: the same text under two names is one step."""
    settings = {name: value for name, value in step.to_dict().items() if name not in ("text", "rows")}
    about = [FORMAT, before, settings, corpus.record["sha256"], corpus.record["held_out_sha256"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _protocol(step: ContinuedPretraining) -> Protocol:
    names = ("learning_rate", "epochs", "batch_size", "weight_decay", "warmup", "precision")
    settings: dict[str, Any] = {name: getattr(step, name) for name in names}
    return Protocol(eval_batch_size=step.batch_size, select="last", **settings)


def _pretrain(
    backbone: str,
    step: ContinuedPretraining,
    corpus: Corpus,
    key: str,
    previous: Path | None,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train one step and keep its weights in `folder/key`; returns its record."""
    started, protocol = time.perf_counter(), _protocol(step)
    model, tokenizer = load_backbone(backbone, head="masked-lm", seed=step.seed)
    kind = MaskedText(tokenizer, share=step.mask_share, max_length=step.max_length, seed=step.seed)
    if previous is None:
        fresh = _has_fresh_head(model, backbone, step.seed)
    else:
        fresh = bool((_read_record(previous) or {}).get("fresh_head"))
        _load(model, previous)
    pieces = kind.encode(in_memory({"text": corpus.texts}))
    measured = kind.source(kind.encode(in_memory({"text": corpus.held_out})))
    attachment = attach(model, FullFineTuning(), seed=step.seed)
    model.to(accelerator.device)
    times = {"pretraining": 0.0, "evaluation": 0.0}
    state = TrainingState(attachment, accelerator, protocol, kind, ("loss",), step.seed, times=times)
    stage = Stage(0, "pretraining", ("adapter", "head"), step.learning_rate, step.epochs)
    before = _loss(state, measured)
    train_stage(state, stage, kind.source(pieces), None)
    record = {
        **corpus.record,
        "tokens": sum(pieces.lengths),
        "updates": int(state.history[-1]["step"]),
        "loss_before": before,
        "loss_after": _loss(state, measured),
        "train_loss": [row["loss"] for row in state.history],
        "fresh_head": fresh,
        "note": FRESH_HEAD if fresh and previous is None else "",
        "settings": step.to_dict(),
        "key": key,
        "device": device_name(accelerator),
        "seconds": time.perf_counter() - started,
    }
    if accelerator.is_main_process:
        with atomic_folder(folder / key) as staging:
            save_file(_state(model), staging / WEIGHTS)
            (staging / WEIGHTS).chmod(0o644)
            record["weights_sha256"] = file_sha256(staging / WEIGHTS)
            atomic_write(staging / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    accelerator.wait_for_everyone()
    return record


def _loss(state: TrainingState, measured: Source) -> float:
    predictions = state.kind.predict(
        state.accelerator, state.attachment.model, measured, state.protocol.eval_batch_size
    )
    return state.kind.score((), predictions, measured.rows)["loss"]


def _has_fresh_head(model: PreTrainedModel, backbone: str, seed: int) -> bool:
    """Whether the checkpoint lacks the head, which then depends on the seed."""
    other, _ = load_backbone(backbone, head="masked-lm", seed=seed + 1)
    heads = zip(head_parameters(model).values(), head_parameters(other).values(), strict=True)
    return any(not torch.equal(one, two) for one, two in heads)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters by name, tied ones once: `base.<name>` and `head.<name>`."""
    parts = {"base": dict(model.base_model.named_parameters()), "head": head_parameters(model)}
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, named in parts.items()
        for name, value in named.items()
    }


def _load(model: PreTrainedModel, folder: Path) -> None:
    """Put a kept masked-LM model, head included, back into a fresh one."""
    put_into(model, folder)
    state = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in head_parameters(model).items():
            parameter.copy_(state[f"head.{name}"])


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a kept step, or None where it is absent or damaged."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        return record if file_sha256(folder / WEIGHTS) == record["weights_sha256"] else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
