"""The widget on a running loop, as in a kernel: previews, scores that follow, looking ahead, cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import pruner as module
from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.background import Background
from hadamard_toolkit.widgets.evaluation import Evaluation
from hadamard_toolkit.widgets.pruner import LayerPruner
from hadamard_toolkit.widgets.pruning_state import Range, Toggle
from tests.widgets.support import shown, until


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


class NeverDone:
    """Stands for a retraining in another process that goes on until it is cancelled."""

    progress = ("stage two", 0.25)
    cancelled = False

    def __init__(self, *_: object) -> None:
        self.begun.append(self)

    begun: ClassVar[list[NeverDone]] = []

    @property
    def finished(self) -> bool:
        return self.cancelled

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> None:
        return None


def test_cancel_and_close_end_a_retraining(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Retraining", NeverDone)
    monkeypatch.setattr(module, "PROCESS_LOOK", 0.01)

    async def session() -> None:
        for end in ("cancel", "close"):
            with LayerPruner(run, store=tmp_path / "runs", ahead=False) as pruner:
                pruner.retrain()
                await until(
                    lambda pruner=pruner: "retraining sst2: stage two" in pruner.panel._progress.value
                )
                with pytest.raises(ArgumentError, match="something is going on already"):
                    pruner.leave_one_out()
                getattr(pruner, end)()
                assert NeverDone.begun[-1].cancelled
                await until(lambda pruner=pruner: pruner.panel._progress.value == "")
        assert len(NeverDone.begun) == 2

    asyncio.run(session())


@pytest.mark.parametrize("long", [True, False])
def test_other_things_happen_between_two_steps_of_the_background(long: bool) -> None:
    seen = []

    async def session() -> None:
        background = Background(lambda *_: None, lambda text: None, lambda: None)
        turns = 0

        def steps() -> Iterator[tuple[str, float]]:
            for _ in range(4):
                seen.append(turns)
                yield "at work", 0.5

        if long:
            background.start(steps(), lambda: None)
        else:
            background.fill(steps())
        while len(seen) < 4:
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(session())
    assert len(set(seen)) == 4
