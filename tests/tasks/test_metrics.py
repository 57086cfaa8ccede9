"""Every metric on every kind of task: allowed, or refused when the task is made."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import DatasetDict

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.tasks.base import Task, in_memory
from hadamard_toolkit.tasks.metrics import BY_KIND
from hadamard_toolkit.training import metrics, squad_metrics

ON_CLASSES = {"accuracy", "macro-f1", "micro-f1", "matthews"}
ALLOWED = {  # kind and number of labels -> metrics
    ("classification", 2): {*ON_CLASSES, "f1"},
    ("classification", 3): ON_CLASSES,
    ("classification", 5): ON_CLASSES,
    ("regression", 0): {"pearson", "spearman"},
    ("span", 0): {"f1", "exact-match"},
}
EVERY = sorted({name for names in BY_KIND.values() for name in names})


def task(kind: str, labels: int, metric: str, *more: str) -> Task:
    columns: dict[str, list[object]] = {
        "classification": {"text": ["a", "b"], "label": [0, 1]},
        "regression": {"text": ["a", "b"], "label": [0.0, 1.0]},
        "span": {"question": ["a"], "context": ["b"], "answers": [{"text": ["b"], "answer_start": [0]}]},
    }[kind]
    texts = ("question", "context") if kind == "span" else ("text",)
    splits = DatasetDict({split: in_memory(columns) for split in ("train", "test")})
    names = tuple("abcde"[:labels])
    return Task("mine", splits, texts, kind, names, metric, metrics=(metric, *more) if more else ())


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize(("kind", "labels"), ALLOWED)
def test_a_metric_fits_its_task_or_is_refused_with_those_that_do(kind: str, labels: int, metric: str) -> None:
    allowed = ALLOWED[kind, labels]
    if metric in allowed:
        assert task(kind, labels, metric).metric == metric
        return
    for headline, *others in ((metric,), (min(allowed), metric)):
        with pytest.raises(
            ArgumentError, match=f"metric={metric!r} is not allowed for kind={kind!r}"
        ) as refused:
            task(kind, labels, headline, *others)
        said = str(refused.value).partition("choose one of ")[2]
        assert {name for name in EVERY if repr(name) in said} == allowed


def test_every_metric_of_the_table_is_computed_and_no_other() -> None:
    labels = np.array([0, 1, 1, 0])
    for name in BY_KIND["classification"]:
        assert metrics.compute([name], np.eye(2)[labels], labels) == {name: 1.0}
    for name in BY_KIND["regression"]:
        assert metrics.compute([name], labels[:, None] * 2.0, labels) == pytest.approx({name: 1.0})
    assert set(metrics.METRICS) == {*BY_KIND["classification"], *BY_KIND["regression"]}
    assert set(squad_metrics.RULES) == set(BY_KIND["span"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [("f1_macro", "macro-f1"), ("Micro F1", "micro-f1"), ("mathews", "matthews"), ("acc", "accuracy")],
)
def test_a_near_miss_gets_a_suggestion(written: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=f"metric={written!r} is not allowed.* Did you mean {meant!r}"):
        task("classification", 3, written)
