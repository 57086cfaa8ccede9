"""The widget, driven through its controls without a browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ipywidgets import Output, Widget

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import pruner as module
from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.evaluation import Evaluation, Score
from hadamard_toolkit.widgets.inputs import profile_of
from hadamard_toolkit.widgets.orders import consensus_order
from hadamard_toolkit.widgets.pruner import LayerPruner
from hadamard_toolkit.widgets.pruning_state import Range, Toggle
from tests.adapters.life import shake
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer


@pytest.fixture
def pruner(run: Run, tmp_path: Path) -> Iterator[LayerPruner]:
    with LayerPruner(run, store=tmp_path / "runs", figures=tmp_path / "figures") as pruner:
        yield pruner


def shown(pruner: LayerPruner) -> list[list[str]]:
    """The cells of the table of scores."""
    rows = re.findall(r"<tr.*?</tr>", pruner.panel._numbers.value)[1:]
    return [re.findall(r"<td.*?>(.*?)</td>", row) for row in rows]


def test_every_control_moves_the_one_state(pruner: LayerPruner) -> None:
    panel = pruner.panel
    assert panel.cancel.disabled, "nothing is going on"
    panel.switch(1).value = False
    assert pruner.state.range_text == panel.range.value == "0,2"
    assert panel.switch(1).description == "Layer 1: pruned"
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


def test_scores_in_words() -> None:
    score = Score("accuracy", 0.71875, 0.8125, -0.2263, 0.0498, n=32, changed=5, gained=1, lost=4, loss=0.6)
    assert views.difference(score) == "−0.0938 [−0.2263, +0.0498]"
    assert views.flipped(score) == "5 of 32 (+1 / −4)"
    nothing = replace(score, value=score.full, low=float("nan"), high=float("nan"))
    assert views.difference(nothing) == "no prediction changed"
    assert views.flipped(replace(score, metric="spearman")) == "— of 32"


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


def test_on_a_loop_a_preview_comes_first_and_the_score_follows_once(run: Run, tmp_path: Path) -> None:
    pruner = LayerPruner(run, store=tmp_path / "runs", ahead=False)
    evaluation = pruner.evaluations[0]

    async def session() -> None:
        for layer in (0, 1, 0):
            pruner.apply(Toggle(layer))
            [row] = shown(pruner)
            assert row[-1] == f"stale: preview on {evaluation.preview(pruner.state.kept).n} rows"
            assert row[3] == views.number(evaluation.preview(pruner.state.kept).value)
        await until(lambda: shown(pruner)[0][-1] == "up to date, validation rows")
        assert shown(pruner)[0][3] == views.number(evaluation.score(pruner.state.kept).value)
        assert [evaluation.known(kept) for kept in ((1, 2), (2,))] == [None, None], "passed over, not scored"
        pruner.apply(Toggle(2))
        pruner.settle()
        assert shown(pruner)[0][-1] == "up to date, validation rows"
        pruner.apply(Toggle(0))
        pruner.close()

    asyncio.run(session())


@pytest.mark.parametrize("ahead", [True, False])
def test_while_nothing_happens_the_next_flips_are_scored_ahead(run: Run, tmp_path: Path, ahead: bool) -> None:
    async def session() -> None:
        with LayerPruner(run, store=tmp_path / "runs", ahead=ahead) as pruner:
            [evaluation] = pruner.evaluations
            layers = pruner.state.layers
            everything = pruner.state.kept
            one_off = [{p for p in everything if p[0] != layer} for layer in layers]
            for _ in range(200 if ahead else 25):  # without looking ahead, time enough in which it would have
                await asyncio.sleep(0.02)
                if all(evaluation.known(kept) for kept in one_off):
                    break
            assert [evaluation.known(kept) is not None for kept in one_off] == [ahead] * len(layers)
            pruner.apply(Toggle(1))
            assert shown(pruner)[0][-1].startswith("up to date" if ahead else "stale: preview")
            if ahead:  # the examples are those of the same state, not of the one before
                flipped = evaluation.score(one_off[1]).changed
                assert flipped
                assert f"{flipped} prediction" in pruner.panel._flips.value
            fresh = Evaluation.of_run(run)
            np.testing.assert_allclose(
                evaluation.logits(one_off[1]), fresh.logits(one_off[1]), rtol=0, atol=1e-6
            )
            pruner.close()
            before = len(evaluation._logits)
            await asyncio.sleep(0.1)
            assert len(evaluation._logits) == before, "a closed pruner computes nothing"

    asyncio.run(session())


def test_opening_prepares_for_a_bounded_time_and_the_rest_follows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LayerPruner(run, store=tmp_path / "runs") as pruner:
        whole = set(pruner.evaluations[0]._cache._prepared)
    assert len(whole) > 2
    monkeypatch.setattr(module, "OPENING", 0.0)

    async def session() -> None:
        with LayerPruner(run, store=tmp_path / "runs") as pruner:
            [cache] = [evaluation._cache for evaluation in pruner.evaluations]
            assert len(cache._prepared) <= 2, "what the first score left"
            await until(lambda: set(cache._prepared) == whole)

    asyncio.run(session())


@pytest.mark.parametrize("ends", ["by itself", "cancelled", "with an error"])
def test_a_score_that_long_work_cut_off_still_comes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")

    async def session() -> None:
        with LayerPruner(run, store=tmp_path / "runs", ahead=False) as pruner:
            panel = pruner.panel
            pruner.apply(Range("0,2"))
            if ends == "with an error":
                leaving = frozenset(pruner.state.places) - {pruner.state.places[3]}
                score = pruner.evaluations[0].score
                monkeypatch.setattr(
                    pruner.evaluations[0], "score", lambda kept: 1 / 0 if kept == leaving else score(kept)
                )
            panel.ablate.press()
            assert shown(pruner)[0][-1].startswith("stale: preview")
            await until(lambda: not panel.cancel.disabled)
            if ends == "cancelled":
                panel.cancel.press()
            await until(lambda: panel.cancel.disabled)
            said = {"by itself": "", "cancelled": "cancelled", "with an error": "division by zero"}[ends]
            await until(lambda: said in panel._message.value)
            await until(lambda: shown(pruner)[0][-1].startswith("up to date"))
            assert shown(pruner)[0][3] == views.number(Evaluation.of_run(run).score((0, 2)).value)

    asyncio.run(session())


def test_a_greedy_search_gives_way_to_cancel_between_batches(run: Run, tmp_path: Path) -> None:
    async def session() -> None:
        with LayerPruner(run, store=tmp_path / "runs", ahead=False) as pruner:
            panel, before = pruner.panel, pruner.state
            passes: list[int] = []
            pruner.evaluations[0]._cache.attachment.model.register_forward_hook(lambda *_: passes.append(1))
            pruner.preset("greedy", 1)
            await until(lambda: "greedy elimination" in panel._progress.value)
            panel.cancel.press()
            begun = len(passes)
            await until(lambda: panel._message.value != "")
            assert "cancelled" in panel._message.value
            assert len(passes) <= begun + 1
            assert pruner.state == before
            pruner.preset("greedy", 1)
            await until(lambda: pruner.state != before)
            *_, last = Evaluation.of_run(run).greedy()
            assert pruner.state.kept_layers == (last,)

    asyncio.run(session())


async def until(holds: Callable[[], bool]) -> None:
    """Give the loop time until something holds."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never held")


def test_an_error_while_looking_ahead_is_shown(pruner: LayerPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")

    def fail(*_: object) -> None:
        raise RuntimeError("no such rows")

    async def session() -> None:
        monkeypatch.setattr(pruner.evaluations[0]._cache, "_pass", fail)
        pruner.settle()
        await asyncio.sleep(0.1)

    asyncio.run(session())
    assert "no such rows" in str(pruner.panel._message.value)


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


def test_on_a_loop_every_task_is_scored(store: RunStore, tmp_path: Path) -> None:
    keys = store.keys()
    runs = [store.run(key) for key in keys]
    pruner = LayerPruner(runs, store=tmp_path, ahead=False)

    async def session() -> None:
        pruner.apply(Toggle(1))
        await until(lambda: all(row[-1] == "up to date, validation rows" for row in shown(pruner)))
        for row, run in zip(shown(pruner), runs, strict=True):
            assert row[3] == views.number(Evaluation.of_run(run).score((0, 2)).value)
        pruner.close()

    asyncio.run(session())


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


def test_text_of_examples_is_escaped() -> None:
    table = pd.DataFrame([[0, "<script>alert(1)</script>", "a", "b", "a", 0.5]],
                         columns=["row", "text", "label", "before", "after", "change"])  # fmt: skip
    html = views.flips({"t": table}, {"t": 1})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_consensus_leaves_the_task_itself_out(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="measured"):
        consensus_order(store, {"sst2"}, range(3))
    rows = []
    for task, worth in (("a", (1, 2, 4)), ("b", (1, 3, 4)), ("sst2", (9, 2, 1))):
        for code in range(8):
            kept = [layer for layer in range(3) if code >> layer & 1]
            score = sum(worth[layer] for layer in kept) / 20
            for split in ("validation", "test"):
                text = ",".join(map(str, kept))
                rows.append(
                    {
                        "key": task,
                        "task": task,
                        "seed": 0,
                        "kept": text,
                        "split": split,
                        "score": score,
                        "loss": 0.0,
                    }
                )
    monkeypatch.setattr("hadamard_toolkit.studies.tables.measured_table", lambda *_: pd.DataFrame(rows))
    assert consensus_order(store, {"sst2"}, range(3)) == (0, 1, 2)
    with pytest.raises(DataError, match="with 6 layers"):
        consensus_order(store, {"sst2"}, range(6))


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
