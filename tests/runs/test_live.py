"""A run whose weights were not kept is trained again, and must come out as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.run import live
from hadamard_toolkit.tasks import TASKS
from tests.training.test_question_answering import SHORT, span_task

MakeSpec = Callable[..., ht.RunSpec]


def test_a_run_that_comes_out_otherwise_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    store = ht.RunStore(tmp_path / "store", keep="vectors")
    spec = make_spec(adapter=ht.LoRA(), protocol=replace(make_spec().protocol, head="trained"))
    ht.run(spec, store)
    run = store.run(spec.key)
    run.predictions["test"]["logits"] = run.predictions["test"]["logits"] + np.float32(0.5)
    with pytest.raises(DataError, match=r"came out otherwise.*0\.5.*keep=\"adapters\""):
        live(run)


def test_answers_that_come_out_otherwise_are_refused_too(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "good-word", lambda root: span_task(train_rows=48, test_rows=12))
    store = ht.RunStore(tmp_path / "store", keep="vectors")
    spec = make_spec(task="good-word", adapter=ht.LoRA(), protocol=replace(SHORT, epochs=1))
    ht.run(spec, store)
    run = store.run(spec.key)
    live(run)
    run.predictions["test"]["score"] = run.predictions["test"]["score"] + np.float32(0.5)
    with pytest.raises(DataError, match=r"came out otherwise \(test score differ by up to 0\.5\)"):
        live(run)
