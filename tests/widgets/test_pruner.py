"""The widget, driven through its controls without a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from ipywidgets import Output, Widget

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.evaluation import Evaluation
from hadamard_toolkit.widgets.pruner import LayerPruner
from hadamard_toolkit.widgets.pruning_state import Range, Toggle
from tests.adapters.life import shake
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer
from tests.widgets.support import shown


def test_every_control_moves_the_one_state(pruner: LayerPruner) -> None:
    panel = pruner.panel
    assert panel.cancel.disabled, "nothing is going on"
    panel.switch(1).value = False
    assert pruner.state.range_text == panel.range.value == "0,2"
    assert panel.switch(1).description == "Layer 1: pruned"
    struck = [layer for layer in range(3) if "hp-pruned" in panel.switch(layer)._dom_classes]
    assert struck == [1], "what is pruned is struck through"
    assert panel.switch(1, "attention_norm").description == "L1 norm: pruned"
    panel.switch(1, "attention_norm").value = True
    assert pruner.state.range_text == "0,2,1:attention_norm"
    assert panel.switch(1).description == "Layer 1: partly kept"
    panel.range.value = "0-1"
    assert pruner.state.kept_layers == (0, 1)
    panel.undo.press()
    assert panel.range.value == "0,2,1:attention_norm"
    panel.redo.press()
    assert panel.range.value == "0-1"
    panel.menu.value, panel.k.value = "k most important", 1
    panel.use.press()
    assert pruner.state.kept_layers == pruner.state.by_importance[:1]
    panel.threshold.value = max(pruner.state.importance)
    assert len(pruner.state.kept) == 1
    panel.reset.press()
    assert pruner.state.range_text == "0-2"
    assert (panel.undo.disabled, panel.redo.disabled) == (False, True)
    while not panel.undo.disabled:
        panel.undo.press()
    assert pruner.state.range_text == "0-2"


def test_the_numbers_are_those_of_an_evaluation_without_a_screen(pruner: LayerPruner, run: Run) -> None:
    evaluation = Evaluation.of_run(run)
    for text in ("0,2", "none", "1:attention_norm", "0-2"):
        pruner.apply(Range(text))
        score = evaluation.score(pruner.state.kept)
        [row] = shown(pruner)
        assert row[2:] == [
            views.number(score.full),
            views.number(score.value),
            views.difference(score),
            views.flipped(score),
            "up to date, validation rows",
        ]
        assert pruner.scores().iloc[0]["value"] == score.value
        assert f"<b>{evaluation.cost(pruner.state.kept)['trained']:,}</b>" in pruner.panel._costs.value
        assert f"{score.changed} predictions flipped" in pruner.panel._flips.value


def test_code_is_shown_when_asked_for_and_stays(pruner: LayerPruner) -> None:
    panel = pruner.panel
    assert (panel.code.description, panel._code.layout.display) == ("Copy as code", "none")
    panel.code.value = True
    pruner.apply(Toggle(1))
    assert (panel.code.description, panel._code.layout.display) == ("Hide the code", "")
    assert "kept = (0, 2)" in panel._code.value
    panel.code.value = False
    assert (panel.code.description, panel._code.layout.display) == ("Copy as code", "none")


def test_code_gives_the_same_numbers_headless(
    pruner: LayerPruner, capsys: pytest.CaptureFixture[str]
) -> None:
    pruner.apply(Range("0,2:attention_norm"))
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(pruner.code(), names)
    assert capsys.readouterr().out.strip() == str(pruner.evaluations[0].score(pruner.state.kept))
    assert names["state"].kept == pruner.state.kept  # type: ignore[attr-defined]
    assert "ht.Stack(ht.LayerNormTuning(layers=(0, 2)), ht.Hadamard(layers=(0,), norm=None))" in pruner.code()


def test_a_failing_callback_is_shown_and_raised_and_the_model_is_as_it_was(
    pruner: LayerPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruner.evaluations[0].attachment.model
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside the model")

    handle = model.base_model.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="inside the model"):
        pruner.panel.switch(1).value = False
    assert "inside the model" in pruner.panel._message.value
    assert 'role="alert"' in pruner.panel._message.value
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle.remove()
    with pytest.raises(ArgumentError, match="there is no layer 7"):
        pruner.panel.range.value = "7"
    assert pruner.panel.range.value == pruner.state.range_text, "the box goes back to what is shown"
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    pruner.panel.range.value = "x"
    assert "layers=&#x27;x&#x27; is not allowed" in pruner.panel._message.value
    pruner.apply(Range("0"))
    assert not pruner.panel._message.value


def test_closing_leaves_the_model_as_it_was() -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    shake(attachment)
    attachment.model.train()
    before = {name: value.clone() for name, value in attachment.model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in attachment.model.modules()]
    with LayerPruner((attachment.model, attachment), tiny_task(), tokenizer=tiny_tokenizer()) as pruner:
        pruner.apply(Toggle(1))
    assert attachment.model.training
    assert all(torch.equal(value, before[name]) for name, value in attachment.model.state_dict().items())
    assert [len(module._forward_hooks) for module in attachment.model.modules()] == hooks
    with pytest.raises(ArgumentError, match="retraining tiny needs what it was trained by"):
        LayerPruner(attachment, tiny_task(), tokenizer=tiny_tokenizer()).retrain()


def test_evidence_on_demand_and_greedy(pruner: LayerPruner) -> None:
    pruner.panel.ablate.press()
    table = pruner.evidence()
    expected = pruner.evaluations[0].leave_one_out()
    assert table["without"].tolist() == expected["difference"].tolist()
    bars = pruner.panel._rows[2]["sites"][2, "attention_norm"][1].value
    assert views.number(expected["difference"].iloc[-1], sign=True) in bars
    pruner.preset("greedy", 2)
    order = list(pruner.evaluations[0].greedy())
    assert pruner.state.kept_layers == tuple(sorted(order[1:]))
    pruner.preset("paper")
    assert len(pruner.state.kept_layers) == 2


def test_several_tasks_under_one_set_of_switches(store: RunStore, tmp_path: Path) -> None:
    keys = store.keys()
    runs = [store.run(key) for key in keys]
    with LayerPruner(runs, store=tmp_path) as pruner:
        pruner.apply(Range("0-1"))
        assert [row[0] for row in shown(pruner)] == [f"sst2 ({run.key[:6]})" for run in runs]
        for row, run in zip(shown(pruner), runs, strict=True):
            assert row[3] == views.number(Evaluation.of_run(run).score((0, 1)).value)
        assert pruner.code().count("Evaluation.of_run(") == 2
        assert len(pruner.table()) == 2 * 6


def test_retraining_goes_through_the_store_and_is_shown_beside(pruner: LayerPruner, tmp_path: Path) -> None:
    pruner.apply(Range("0,2"))
    pruner.panel.retrain.press()
    [key] = RunStore(tmp_path / "runs").keys()
    run = RunStore(tmp_path / "runs").run(key)
    assert run.spec == pruner.pruned_specs()[0]
    assert run.spec.adapter == ht.Hadamard(layers=(0, 2))
    first, second = shown(pruner)
    assert second[0] == "sst2, retrained"
    assert second[3] == views.number(run.metrics["validation"]["accuracy"])
    assert second[2] == first[2]
    assert second[-1] == f"run {key}"
    pruner.apply(Range("0"))
    assert len(shown(pruner)) == 1, "another state, another model"


def test_the_figure_says_what_is_shown(pruner: LayerPruner, tmp_path: Path) -> None:
    pruner.apply(Range("1-2"))
    pruner.panel.export.press()
    record = json.loads((tmp_path / "figures" / "pruned_layers.json").read_text())
    rows = pd.DataFrame(record["table"]["records"])
    assert record["notes"]["kept"] == "1-2"
    assert set(rows.loc[rows["kept"], "layer"]) == {1, 2}
    assert rows["value"].tolist() == pytest.approx([pruner.scores()["value"].iloc[0]] * len(rows))
    assert "written: pruned_layers.pdf" in pruner.panel._message.value


def test_what_a_reader_cannot_see_is_said(pruner: LayerPruner) -> None:
    """State in the words of a button, tooltips, live regions; no Output and no code in the view."""
    pruner.apply(Toggle(1))
    assert not any(isinstance(widget, Output) for widget in below(pruner))
    for layer in range(3):
        switch = pruner.panel.switch(layer)
        assert switch.description.endswith("kept" if switch.value else "pruned")
        assert switch.tooltip
    assert 'aria-live="polite"' in pruner.panel._numbers.value
    assert "<script" not in "".join(widget.value for widget in (pruner.panel._numbers, pruner.panel._code))
    assert repr(pruner) == "LayerPruner(sst2; kept: 0,2)"


def below(widget: Widget) -> Iterator[Widget]:
    """A widget and all in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from below(child)


def test_a_figure_of_an_attachment_names_no_runs(tmp_path: Path) -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    with LayerPruner(attachment, tiny_task(), tokenizer=tiny_tokenizer(), figures=tmp_path) as pruner:
        record = json.loads(pruner.export().json.read_text())
    assert record["notes"] == {"kept": "0-2", "runs": []}


def test_consensus_keeps_the_layers_that_other_tasks_remove_last(
    pruner: LayerPruner, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def order(store: RunStore, tasks: set[str], layers: tuple[int, ...]) -> tuple[int, ...]:
        asked.append((store.folder, tasks, layers))
        return (2, 0, 1)

    monkeypatch.setattr("hadamard_toolkit.widgets.pruner.consensus_order", order)
    assert pruner.preset("consensus", 1).kept_layers == (1,)
    assert pruner.preset("consensus", 2).kept_layers == (0, 1)
    assert pruner.preset("consensus").kept_layers == (0, 1, 2)
    assert asked == [(run.store, {"sst2"}, (0, 1, 2))], "once, in the store that the run was read from"
    other = RunStore(tmp_path / "others")
    with LayerPruner(run, store=tmp_path / "runs", reference=other.folder, ahead=False) as pruner:
        assert pruner.preset("consensus", 1).kept_layers == (1,)
    assert asked[1][0] == other.folder
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    with (
        LayerPruner(attachment, tiny_task(), tokenizer=tiny_tokenizer(), ahead=False) as pruner,
        pytest.raises(ArgumentError, match="reference=None is not allowed here"),
    ):
        pruner.preset("consensus", 1)


def test_a_range_in_other_words_is_written_as_the_pruner_writes_it(pruner: LayerPruner) -> None:
    pruner.panel.range.value = "0, 1,2"
    assert pruner.panel.range.value == "0-2"
    assert not pruner.state.can_undo, "nothing has changed"


def test_tasks_with_other_places_do_not_share_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = [
        Evaluation(ht.attach(tiny_bert(), adapter), tiny_task(), tiny_tokenizer(), name=name)
        for name, adapter in (("first", ht.Hadamard()), ("second", ht.Hadamard(layers=(0, 1))))
    ]
    monkeypatch.setattr(
        "hadamard_toolkit.widgets.pruner.subjects", lambda *_, **__: (evaluations, [None] * 2, [None] * 2)
    )
    with pytest.raises(ArgumentError, match="second has its adapter in other places than first"):
        LayerPruner([])


def test_a_click_does_what_the_button_says(pruner: LayerPruner) -> None:
    pruner.apply(Toggle(1))
    for button, text in (("undo", "0-2"), ("redo", "0,2"), ("reset", "0-2")):
        getattr(pruner.panel, button).click()
        assert pruner.state.range_text == text
