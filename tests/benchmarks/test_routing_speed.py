"""One batch over several adapters by row: against the plain backbone, and against stock peft's `adapter_names`.

`python -m pytest -m benchmark tests/benchmarks/test_routing_speed.py -s` prints a table and writes it, with machine and
versions, to `build/benchmarks/routing_speed_<device>.json` (`$HADAMARD_BENCHMARKS` moves the folder). The model has the
shape of MiniLM with random weights, rows are 32 tokens long. Every number is a median over passes that take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.runs import environment
from tests.benchmarks.test_bank_speed import model_of

pytestmark = pytest.mark.benchmark

OUT = Path(os.environ.get("HADAMARD_BENCHMARKS", "build/benchmarks"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOKENS, PASSES = 32, 32, 15
ADAPTERS = (1, 2, 4, 8, 16, 32)
METHODS = {
    "Hadamard": ht.Hadamard(),
    "norms": ht.LayerNormTuning(),
    "IA3": ht.IA3(),
    "BitFit": ht.BitFit(),
    "LoRA": ht.LoRA(),
    "Pfeiffer": ht.Pfeiffer(),
}


def medians(passes: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, taking turns, so that what else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.no_grad():
        for _ in range(PASSES + 2):
            for name, do in passes.items():
                begun = time.perf_counter()
                do()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 30000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0), device="cpu")
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}


def routed(adapter: ht.Adapter, count: int, folder: Path) -> Callable[[], Any]:
    """A pass over `count` adapters of one kind, rows in turn."""
    folders = {}
    model = model_of("minilm").to(DEVICE)
    for number in range(count):
        attachment = ht.attach(model, adapter, seed=number)
        folders[f"task{number}"] = folder / f"{type(adapter).__name__}-{count}-{number}"
        attachment.save(folders[f"task{number}"])
        attachment.detach()
    router, batch = ht.route(model, folders), inputs()
    names = [f"task{row % count}" for row in range(ROWS)]
    return lambda: router(names, **batch)


def of_peft(count: int) -> Callable[[], Any]:
    """The same with stock peft's LoRA on query and value."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model_of("minilm"), config, adapter_name="task0")
    for number in range(1, count):
        model.add_adapter(f"task{number}", config)
    model.to(DEVICE).eval()
    names, batch = [f"task{row % count}" for row in range(ROWS)], inputs()
    return lambda: model(**batch, adapter_names=names)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_one_batch_over_several_adapters(tmp_path: Path) -> None:
    plain, batch = model_of("minilm").to(DEVICE).eval(), inputs()
    rows = []
    for count in ADAPTERS:
        methods = METHODS if count == 8 else {name: METHODS[name] for name in ("Hadamard", "LoRA")}
        passes: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
        passes |= {name: routed(adapter, count, tmp_path) for name, adapter in methods.items()}
        passes["peft LoRA"] = of_peft(count)
        found = medians(passes)
        for name, seconds in found.items():
            rows.append(
                {
                    "adapters": count,
                    "method": name,
                    "milliseconds": round(1000 * seconds, 2),
                    "of plain": round(seconds / found["plain"], 3),
                    "peft over it": round(found["peft LoRA"] / seconds, 3),
                }
            )
            print(rows[-1])
    facts = {
        "device": environment.describe_device(torch.device(DEVICE)),
        "system": environment.system(),
        "versions": environment.versions() | {"peft": peft.__version__},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"routing_speed_{DEVICE}.json").write_text(json.dumps(facts, indent=1) + "\n")
