"""Training and inference beside plain transformers and stock peft: steps, stage one, two stages, merged inference.

`python -m pytest -m benchmark tests/benchmarks/test_training_speed.py -s` prints a table and writes it, with machine
and versions, to `build/benchmarks/training_speed_<device>.json` (`$HADAMARD_BENCHMARKS` moves the folder). MiniLM on
rows of SST-2. What is compared takes turns in this process; every number is a median, with the least and the most.

The peer of the two stages trains as its users do: `Trainer` on the head with the backbone frozen, then stock peft's
(IA)³, scored after every epoch like ours.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments

import hadamard_toolkit as ht
from hadamard_toolkit.runs import environment
from hadamard_toolkit.training.data import Data

pytestmark = [pytest.mark.benchmark, pytest.mark.glue]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = Path(os.environ.get("HADAMARD_BENCHMARKS", "build/benchmarks"))
ROWS, HELD_OUT, BATCH = 600, 200, 16
HEAD_EPOCHS, EPOCHS = 10, 3
TURNS, STEPS = 3, 20
SIZES: dict[str, Any] = {
    "train_rows": ROWS, "validation_rows": HELD_OUT, "test_rows": HELD_OUT, "batch_size": BATCH, "max_length": 64,
}  # fmt: skip
TASK = "sst2"


def seconds(passes: dict[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, list[float]]:
    """What each takes, taking turns, so that what else the machine does hits all alike; the first is not counted.

    Where a pass returns seconds, these count.
    """
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(turns + 1):
        for name, do in passes.items():
            begun = time.perf_counter()
            own = do()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begun if own is None else own)
    return {name: values[1:] for name, values in taken.items()}


def rows_of(what: str, taken: dict[str, list[float]], ours: str, **more: Any) -> list[dict[str, Any]]:
    """One row per contestant; `ours is faster`: its median over ours."""
    middle = statistics.median(taken[ours])
    rows = []
    for name, values in taken.items():
        row = {"what": what, "contestant": name, "seconds": round(statistics.median(values), 4)}
        row |= {"least": round(min(values), 4), "most": round(max(values), 4)}
        rows.append(row | {"ours is faster": round(statistics.median(values) / middle, 3)} | more)
        print(rows[-1], flush=True)
    return rows


def model() -> tuple[PreTrainedModel, Any]:
    loaded, tokenizer = ht.load_backbone("minilm-l6")
    return loaded.to(DEVICE), tokenizer


def _training_steps() -> list[dict[str, Any]]:
    batch = None
    passes = {}
    for name, adapter in {"Hadamard": ht.Hadamard(), "the same norms": ht.LayerNormTuning()}.items():
        loaded, tokenizer = model()
        attachment = ht.attach(loaded, adapter)
        attachment.train_only("adapter", "norm")
        batch = batch or _batch(tokenizer)
        passes[name] = _steps(loaded, list(attachment.parameters()), batch)
    loaded, _ = model()
    config = peft.IA3Config(task_type="SEQ_CLS")
    other = peft.get_peft_model(loaded, config)
    trained = [parameter for name, parameter in other.named_parameters() if "ia3" in name]
    for parameter in other.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    passes["stock peft (IA)3"] = _steps(other, trained, batch)
    return rows_of(f"{STEPS} training steps", seconds(passes, 5), "Hadamard")


def _batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    texts = ht.load_task(TASK).splits["train"]["sentence"][:BATCH]
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**encoded.to(DEVICE), "labels": torch.arange(BATCH, device=DEVICE) % 2}


def _steps(module: Any, parameters: list[torch.nn.Parameter], batch: Any) -> Callable[[], None]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    module.train()

    def do() -> None:
        for _ in range(STEPS):
            module(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return do


def ours(precision: str, *, stage_one: bool = False) -> Callable[[], float | None]:
    """Both stages, evaluation and loading included; or the seconds of stage one with its features."""

    def do() -> float | None:
        loaded, tokenizer = model()
        protocol = ht.protocols.hadamard(head_epochs=HEAD_EPOCHS, epochs=EPOCHS, precision=precision, **SIZES)
        attachment = ht.attach(loaded, ht.HeadOnly() if stage_one else ht.Hadamard())
        outcome = ht.train(attachment, ht.load_task(TASK), tokenizer, protocol)
        if stage_one:
            return outcome.times["features"] + outcome.times["stage_one"]
        scores.setdefault(f"ours, {precision}", []).append(outcome.metrics["test"]["accuracy"])
        return None

    return do


def peer(precision: str, *, stage_one: bool = False) -> Callable[[], float | None]:
    """`Trainer` on the head, then on peft's (IA)³, evaluation and loading included; or the seconds of the first."""

    def do() -> float | None:
        loaded, tokenizer = model()
        task = ht.load_task(TASK)
        data = Data(task, tokenizer, ht.protocols.hadamard(**SIZES), 0)
        splits = {name: data.rows(name) for name in ("train", "validation", "test")}
        for parameter in loaded.base_model.parameters():
            parameter.requires_grad_(False)
        trainer = _trainer(loaded, tokenizer, splits, precision, HEAD_EPOCHS, 2e-2, evaluate=not stage_one)
        begun = time.perf_counter()
        trainer.train()
        if stage_one:
            return time.perf_counter() - begun
        config = peft.IA3Config(task_type="SEQ_CLS")
        trainer = _trainer(peft.get_peft_model(loaded, config), tokenizer, splits, precision, EPOCHS, 5e-3)
        trainer.train()
        score = trainer.evaluate(splits["test"])["eval_accuracy"]
        scores.setdefault(f"peer, {precision}", []).append(float(score))
        return None

    return do


def _trainer(
    module: Any,
    tokenizer: Any,
    splits: Any,
    precision: str,
    epochs: int,
    rate: float,
    *,
    evaluate: bool = True,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(OUT / "trainer"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=128,
        num_train_epochs=epochs, learning_rate=rate, eval_strategy="epoch" if evaluate else "no",
        save_strategy="no", report_to=[],
        disable_tqdm=True, bf16=precision == "bf16", logging_strategy="no", use_cpu=DEVICE == "cpu",
    )  # fmt: skip
    return Trainer(
        module,
        arguments,
        DataCollatorWithPadding(tokenizer),
        splits["train"],
        splits["validation"],
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )


scores: dict[str, list[float]] = {}


@pytest.mark.filterwarnings("ignore")  # those of the peers
def test_training_and_inference_beside_the_peers() -> None:
    table = _training_steps()
    for precision in ("fp32", "bf16"):
        both = {"ours": ours(precision), "peft + Trainer": peer(precision)}
        taken = seconds(both, 2)
        found = {name: statistics.mean(values) for name, values in scores.items() if precision in name}
        score = f"{found[f'ours, {precision}']:.3f} / {found[f'peer, {precision}']:.3f}"
        table += rows_of(
            f"two stages, {HEAD_EPOCHS} + {EPOCHS} epochs, {precision}", taken, "ours", score=score
        )
    heads = {"ours": ours("fp32", stage_one=True), "Trainer": peer("fp32", stage_one=True)}
    table += rows_of(f"stage one, {HEAD_EPOCHS} epochs", seconds(heads, 2), "ours")
    table += _inference()
    device = environment.describe_device(torch.device(DEVICE))
    facts = {
        "device": device,
        "system": environment.system(),
        "versions": environment.versions() | {"peft": peft.__version__},
        "threads": torch.get_num_threads(),
        "rows": table,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"training_speed_{device['device']}.json").write_text(json.dumps(facts, indent=1) + "\n")


def _inference() -> list[dict[str, Any]]:
    plain, tokenizer = model()
    adapted, _ = model()
    attachment = ht.attach(adapted, ht.Hadamard())
    with torch.no_grad():
        for parameter in attachment.parameters("adapter"):
            parameter.add_(0.01)
    merged = attachment.merge()
    batch = _batch(tokenizer)

    def passes(module: PreTrainedModel) -> Callable[[], None]:
        def do() -> None:
            with torch.no_grad():
                for _ in range(STEPS):
                    module(**batch)

        return do

    return rows_of(
        f"{STEPS} passes of {BATCH} rows",
        seconds({"merged": passes(merged.eval()), "plain backbone": passes(plain.eval())}, 5),
        "merged",
    )
