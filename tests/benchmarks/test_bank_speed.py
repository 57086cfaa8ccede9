"""A bank of K runs against K runs one after another: seconds per step, peak memory, and the share of the floor.

`python -m pytest -m benchmark tests/benchmarks/test_bank_speed.py -s` prints a table and writes it, with machine and
versions, to `build/benchmarks/bank_speed_<device>.json` (`$HADAMARD_BENCHMARKS` moves the folder). Models have the
shape of MiniLM and MPNet with random weights, rows are synthetic: the time does not depend on either. Every number is
the median over the epochs after the first of one training in this process.

The floor is the arithmetic of the frozen linear layers, forward once and backward once for the activations, at the
rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from transformers import AutoConfig, PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.runs import environment
from hadamard_toolkit.tasks.base import Task, in_memory
from hadamard_toolkit.training.bank import Member, train_bank
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from tests.training.tiny import BAD, FILLER, GOOD, tiny_tokenizer

pytestmark = pytest.mark.benchmark

CUDA = torch.cuda.is_available()
OUT = Path(os.environ.get("HADAMARD_BENCHMARKS", "build/benchmarks"))
EPOCHS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "mpnet": {"model_type": "mpnet", "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
METHODS = {
    "Hadamard": ht.Hadamard(),
    "norms": ht.LayerNormTuning(norm="both"),
    "full": ht.FullFineTuning(),
}
# shape, method, rows per batch, tokens per row, precision -> sizes of the bank
CASES: list[tuple[str, str, int, int, str, tuple[int, ...]]] = (
    [
        ("minilm", "Hadamard", 16, 32, "bf16", (1, 8, 16, 32, 64)),
        ("mpnet", "Hadamard", 32, 32, "bf16", (1, 8, 16)),
        ("minilm", "norms", 16, 32, "bf16", (8, 32)),
        ("minilm", "Hadamard", 16, 32, "fp32", (8, 32)),
        ("minilm", "full", 16, 32, "bf16", (8,)),
        ("minilm", "Hadamard", 16, 128, "bf16", (8, 32)),
        ("mpnet", "Hadamard", 32, 96, "bf16", (8,)),
        ("mpnet", "full", 32, 32, "bf16", (4,)),
    ]
    if CUDA
    else [
        ("minilm", "Hadamard", 8, 24, "fp32", (1, 4, 8)),
        ("minilm", "Hadamard", 16, 24, "fp32", (8,)),
        ("minilm", "Hadamard", 8, 24, "bf16", (8,)),
    ]
)


def model_of(shape: str) -> PreTrainedModel:
    heads = SHAPES[shape]["hidden_size"] // 64 * (2 if shape == "minilm" else 1)
    config = AutoConfig.for_model(
        **SHAPES[shape],
        num_attention_heads=heads,
        vocab_size=30527,
        max_position_embeddings=514,
        pad_token_id=0,
    )
    return ht.backbone_from_config(config)


def task_of(rows: int, tokens: int) -> Task:
    random_ = random.Random(0)
    words = [*GOOD, *BAD, *FILLER]
    texts = [" ".join(random_.choices(words, k=tokens - 2)) for _ in range(rows)]
    data = in_memory({"text": texts, "label": [row % 2 for row in range(rows)]})
    return Task("synthetic", DatasetDict(train=data, test=data.select(range(8))), ("text",), "classification",
                ("bad", "good"), "accuracy")  # fmt: skip


def matrix_rate(precision: str) -> float:
    """Multiply-adds times two per second of a large product at this precision."""
    size, device = (8192, "cuda") if CUDA else (1024, "cpu")
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.randn(size, size, device=device, dtype=kind)
    times = []
    for _ in range(12):
        begun = time.perf_counter()
        one @ one
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(times[2:])


def linear_work(model: PreTrainedModel, tokens: int) -> float:
    """Operations of the encoder's linear layers on so many tokens, forward and backward for the activations."""
    weights = sum(
        module.weight.numel()
        for module in model.base_model.encoder.modules()
        if isinstance(module, torch.nn.Linear)
    )
    return 4.0 * weights * tokens


def step_seconds(histories: list[list[dict[str, Any]]], steps: int) -> float:
    """Seconds of a step, shares of all runs together: the median over the epochs after the first."""
    epochs = zip(*histories, strict=True)
    return statistics.median([sum(row["seconds"] for row in epoch) / steps for epoch in list(epochs)[1:]])


def test_a_bank_against_single_runs() -> None:
    tokenizer, table = tiny_tokenizer(), []
    rates = {precision: matrix_rate(precision) for precision in ("fp32", "bf16")}
    for shape, method, batch, tokens, precision, sizes in CASES:
        steps = 24 if CUDA else 4
        task = task_of(batch * steps, tokens)
        protocol = Protocol(
            epochs=EPOCHS, batch_size=batch, validation_rows=0, select="last", precision=precision
        )

        model = model_of(shape)

        def attachment(model: PreTrainedModel = model, method: str = method) -> ht.Attachment:
            return ht.attach(copy.deepcopy(model), METHODS[method])

        common = {
            "shape": shape,
            "method": method,
            "batch": batch,
            "tokens": tokens,
            "precision": precision,
        }

        def note(
            runs: int, seconds: float, solo: float, floor: float, common: dict[str, Any] = common
        ) -> None:
            """`runs` is 0 for a single run without a bank."""
            together = max(runs, 1)
            row = {
                "runs": runs,
                "step_ms": 1e3 * seconds,
                "per_run_ms": 1e3 * seconds / together,
                "ratio": solo * together / seconds,
                "floor_share": floor * together / seconds,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
            }
            table.append(common | row)
            print(
                {name: round(v, 3) if isinstance(v, float) else v for name, v in table[-1].items()},
                flush=True,
            )

        environment.reset_peak_memory()
        one = attachment()
        solo = step_seconds([train(one, task, tokenizer, protocol).history], steps)
        floor = linear_work(one.model, batch * tokens) / rates[precision]
        note(0, solo, solo, floor)
        del one
        for size in sizes:
            environment.reset_peak_memory()
            members = [Member(attachment(), task, tokenizer, protocol, seed) for seed in range(size)]
            found = train_bank(members)
            failures = [outcome for outcome in found if isinstance(outcome, Exception)]
            assert not failures, failures
            histories = [outcome.history for outcome in found if not isinstance(outcome, Exception)]
            note(size, step_seconds(histories, steps), solo, floor)
            del found, members
            if CUDA:
                torch.cuda.empty_cache()
        write(table, rates)  # after every case: time may run out


def write(table: list[dict[str, Any]], rates: dict[str, float]) -> None:
    device = environment.describe_device(torch.device("cuda" if CUDA else "cpu"))
    facts = {
        "device": device,
        "system": environment.system(),
        "versions": environment.versions(),
        "matrix_rate": rates,
        "rows": table,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"bank_speed_{device['device']}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
