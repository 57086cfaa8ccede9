"""What the pruner takes, and what it makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.widgets.inputs import profile_of
from hadamard_toolkit.widgets.pruner import LayerPruner
from hadamard_toolkit.widgets.pruning_state import Toggle
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer


def test_a_figure_is_marked_as_smoke_where_its_runs_are(
    tiny_spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HADAMARD_PROFILE", raising=False)

    def spec(rows: int | None) -> RunSpec:
        return replace(tiny_spec, protocol=replace(tiny_spec.protocol, train_rows=rows))

    assert profile_of([spec(1000), spec(192)]) == "smoke"
    assert profile_of([spec(193), spec(None)]) == "runs"
    assert profile_of([None]) is None, "what it was trained by is not known"
    monkeypatch.setenv("HADAMARD_PROFILE", "paper")
    assert profile_of([spec(192)]) is None, "said by the environment"


def test_what_the_pruner_cannot_take_is_refused(run: Run) -> None:
    with pytest.raises(ArgumentError, match="give a Run, several, an Attachment"):
        LayerPruner("sst2")  # type: ignore[arg-type]
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    with pytest.raises(ArgumentError, match="task and tokenizer are needed"):
        LayerPruner(attachment)
    with pytest.raises(ArgumentError, match="that attachment is on another model"):
        LayerPruner((tiny_bert(), attachment), tiny_task(), tokenizer=tiny_tokenizer())
    with pytest.raises(ArgumentError, match="a stored run knows its own"):
        LayerPruner(run, "sst2")
    with pytest.raises(ArgumentError, match="this run was not stored; give its attachment"):
        LayerPruner(replace(run, folder=None, attachment=attachment))


def test_a_task_is_known_by_its_name(tiny_spec: RunSpec) -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    with LayerPruner(attachment, tiny_spec.task, tokenizer=tiny_tokenizer(), rows=8, ahead=False) as pruner:
        assert pruner.evaluations[0].task.name == tiny_spec.task
        assert pruner.scores()["n"].tolist() == [8]


def test_what_cannot_be_retrained_says_so_in_the_code(tiny_spec: RunSpec) -> None:
    attachment = ht.attach(tiny_bert(), ht.BitFit())
    spec = replace(tiny_spec, adapter=ht.BitFit())
    with LayerPruner(attachment, tiny_task(), tokenizer=tiny_tokenizer(), spec=spec, ahead=False) as pruner:
        pruner.apply(Toggle(0))
        assert "# BitFit() with 1-2 alone cannot be trained anew: it has no field `layers`" in pruner.code()
