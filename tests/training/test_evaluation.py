"""Scores of predictions, and what several processes have to agree on."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.training import evaluation
from hadamard_toolkit.training.evaluation import (
    device_name,
    everywhere,
    inputs_of,
    open_accelerator,
    score,
)
from hadamard_toolkit.training.protocol import Protocol


def test_the_loss_is_the_mean_over_rows() -> None:
    logits, labels = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), np.array([0, 0, 1])
    found = score(("accuracy",), logits, labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    expected = functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert found["loss"] == pytest.approx(float(expected))
    numbers = np.array([1.0, 2.0, 4.0], np.float32)
    found = score(("pearson",), np.array([[1.0], [2.0], [3.0]]), numbers)
    assert found["loss"] == pytest.approx(1 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3], numbers)[0, 1])


def test_the_model_reads_neither_labels_nor_the_places_of_rows() -> None:
    batch = {name: torch.zeros(1) for name in ("input_ids", "attention_mask", "row", "labels")}
    assert set(inputs_of(batch)) == {"input_ids", "attention_mask"}


def test_batches_are_shared_evenly_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "Accelerator", lambda **options: SimpleNamespace(num_processes=3))
    assert open_accelerator(Protocol(batch_size=6, eval_batch_size=9)).num_processes == 3
    for field, sizes in (("batch_size", (8, 9)), ("eval_batch_size", (6, 8))):
        with pytest.raises(ArgumentError, match=f"^{field}=8 is not allowed on 3 processes; .* multiple"):
            open_accelerator(Protocol(batch_size=sizes[0], eval_batch_size=sizes[1]))


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_something_holds_everywhere_if_it_holds_in_every_process(flags: tuple[bool, bool]) -> None:
    several: Any = SimpleNamespace(num_processes=2, device="cpu", gather=lambda flag: torch.tensor(flags))
    assert everywhere(several, flags[0]) is all(flags)
    alone: Any = SimpleNamespace(num_processes=1)
    assert everywhere(alone, flags[0]) is flags[0]


def test_a_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    assert device_name(cpu) == f"cpu ({torch.get_num_threads()} of {os.cpu_count()} threads)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    card: Any = SimpleNamespace(device=torch.device("cuda", 1))
    assert device_name(card) == "card 1"
