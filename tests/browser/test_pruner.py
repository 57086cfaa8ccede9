"""The pruner as people meet it: in Voilà and in JupyterLab, checked against what it computes without a screen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs the extra `browser`; make browser-test installs it")
from playwright.sync_api import Locator, Page, expect

from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.evaluation import Evaluation, Score
from hadamard_toolkit.widgets.pruning_state import Event, Keep, PruningState, Range, Toggle, Undo
from tests.browser.conftest import BEFORE, PATIENCE, SCREENS, STUDY

pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE * 1000)


class Headless:
    """What should be shown, from the state model and the evaluation alone."""

    def __init__(self, run_key: str, store: RunStore) -> None:
        self.evaluation = Evaluation.of_run(store.run(run_key))
        self.state = PruningState.of(self.evaluation.places, self.evaluation.importance)

    def apply(self, event: Event) -> None:
        self.state = self.state.apply(event)

    @property
    def score(self) -> Score:
        return self.evaluation.score(self.state.kept)


@pytest.fixture
def headless(places: dict[str, str], store: RunStore) -> Headless:
    return Headless(places["HADAMARD_RUN"], store)


def check(page: Page, headless: Headless) -> None:
    """Everything shown is what the state and its evaluation say, once the numbers are up to date."""
    state, score = headless.state, headless.score
    expect(page.locator(".hp-scores caption b")).to_have_text(state.range_text)
    row = page.locator(".hp-scores tbody tr").first
    expect(row.locator("td").last).to_contain_text("up to date")
    assert row.locator("td").all_text_contents()[1:6] == [
        score.metric,
        views.number(score.full),
        views.number(score.value),
        views.difference(score),
        views.flipped(score),
    ]
    cost = headless.evaluation.cost(state.kept)
    expect(page.get_by_text(re.compile(rf"^Trained {cost['trained']:,} of "))).to_be_visible()
    for layer in state.layers:
        kept = [place in state.kept for place in state.places if place[0] == layer]
        words = "kept" if all(kept) else "partly kept" if any(kept) else "pruned"
        expect(page.get_by_role("button", name=f"Layer {layer}: {words}", exact=True)).to_be_visible()
    expect(range_box(page)).to_have_value(state.range_text)


def range_box(page: Page) -> Locator:
    return page.get_by_placeholder("0-3,7")


def by_keyboard_to(page: Page, target: Locator, *, backwards: bool = False) -> None:
    """Press Tab until `target` has the focus."""
    for _ in range(80):
        if target.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Shift+Tab" if backwards else "Tab")
    raise AssertionError("the keyboard does not get there")


def drive(page: Page, headless: Headless, places: dict[str, str]) -> None:
    """One session: flip by mouse, range and undo by keyboard, an error, retrain, export."""
    check(page, headless)
    page.get_by_role("button", name="Layer 1: kept").click()
    headless.apply(Toggle(1))
    check(page, headless)
    page.get_by_role("button", name="L2 norm: kept").click()
    headless.apply(Toggle(2, "attention_norm"))
    check(page, headless)

    # the range box and undo, with the keyboard alone
    by_keyboard_to(page, range_box(page), backwards=True)
    page.keyboard.press("Control+A")
    page.keyboard.type("0,2")
    page.keyboard.press("Enter")
    headless.apply(Range("0,2"))
    check(page, headless)
    page.keyboard.press("Control+A")
    page.keyboard.type("0-9")
    page.keyboard.press("Enter")
    expect(page.locator(".hadamard-pruner [role=alert]")).to_contain_text(
        "there is no layer 9; layers go from 0 to 2"
    )
    check(page, headless)
    undo = page.get_by_role("button", name="Undo", exact=True)
    by_keyboard_to(page, undo)
    page.keyboard.press("Space")
    headless.apply(Undo())
    check(page, headless)
    page.keyboard.press("Space")
    headless.apply(Undo())
    check(page, headless)

    page.get_by_role("button", name="Retrain", exact=True).click()
    row = page.locator(".hp-scores tbody tr").nth(1)
    expect(row).to_contain_text("retrained")
    retrained = RunStore(places["HADAMARD_RETRAINED"])
    done = retrained.load().drop_duplicates("key")
    [key] = done.loc[done["label"] == "Hadamard(layers=(0, 2))", "key"]
    expect(row).to_contain_text(f"run {key}")
    assert row.locator("td").nth(3).text_content() == views.number(
        retrained.run(key).metrics["validation"]["accuracy"]
    )

    page.get_by_role("button", name="Export figure").click()
    expect(page.get_by_text("written: pruned_layers.pdf")).to_be_visible()
    record = json.loads(Path(places["HADAMARD_FIGURES"], "pruned_layers.json").read_text())
    assert record["notes"]["kept"] == headless.state.range_text == "0,2"

    code = page.get_by_label("Code", exact=True)
    expect(code).to_be_hidden()
    page.get_by_role("button", name="Copy as code").click()
    expect(code).to_be_visible()
    assert "kept = (0, 2)" in code.input_value()
    assert f".run({places['HADAMARD_RUN']!r})" in code.input_value()


def opened(page: Page) -> None:
    """Wait for the pruner, or fail with what stands there instead."""
    numbers, failure = page.locator(".hp-scores"), page.get_by_text("There was an error when executing")
    expect(numbers.or_(failure).first).to_be_visible()
    assert not failure.count(), page.locator("body").inner_text()


def screenshot(page: Page, name: str) -> None:
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"{name}.png", full_page=True)


def test_voila(page: Page, voila: str, headless: Headless, places: dict[str, str]) -> None:
    page.goto(voila, wait_until="commit")
    opened(page)
    drive(page, headless, places)
    screenshot(page, "voila-light")
    page.set_viewport_size({"width": 420, "height": 2000})
    screenshot(page, "voila-narrow")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, "nothing sticks out at a narrow width"


def test_voila_in_the_dark(page: Page, voila: str, headless: Headless) -> None:
    page.goto(f"{voila}?theme=dark", wait_until="commit")
    opened(page)
    check(page, headless)
    page.get_by_role("button", name="Layer 0: kept").click()
    headless.apply(Toggle(0))
    check(page, headless)
    assert contrast(page) > 0.5, "light on dark"
    screenshot(page, "voila-dark")


def menu(page: Page, name: str) -> Locator:
    return page.locator(".widget-dropdown").filter(has=page.get_by_text(name, exact=True)).locator("select")


def test_a_rule_a_second_run_and_a_change_of_mind(
    page: Page, voila: str, headless: Headless, places: dict[str, str], store: RunStore
) -> None:
    page.goto(voila, wait_until="commit")
    opened(page)
    menu(page, "Preset").select_option("greedy, k layers")
    page.get_by_label("k", exact=True).fill("1")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Apply preset").click()
    *_, last = headless.evaluation.greedy()
    headless.apply(Keep((last,)))
    check(page, headless)

    # a retraining that is cancelled leaves nothing behind, and another may follow
    before = folders(places)
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    expect(cancel).to_be_disabled()
    page.get_by_role("button", name="Retrain", exact=True).click()
    expect(page.get_by_text("retraining sst2")).to_be_visible()
    cancel.click()
    expect(page.get_by_text("cancelled", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Retrain", exact=True)).to_be_enabled()
    assert folders(places) == before
    expect(page.locator(".hp-scores tbody tr")).to_have_count(1)

    # both runs under one set of switches
    [other] = {*store.keys()} - {places["HADAMARD_RUN"]}
    choice = menu(page, "Beside it").locator("option").filter(has_text=f"({other[:6]})")
    menu(page, "Beside it").select_option(label=choice.text_content())
    expect(page.locator(".hp-scores tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Layer 2: kept").click()
    for row, key in enumerate((places["HADAMARD_RUN"], other)):
        cells = page.locator(".hp-scores tbody tr").nth(row).locator("td")
        expect(cells.last).to_contain_text("up to date")
        score = Evaluation.of_run(store.run(key)).score((0, 1))
        assert cells.all_text_contents()[0] == f"sst2 ({key[:6]})"
        assert cells.all_text_contents()[2:4] == [views.number(score.full), views.number(score.value)]
    screenshot(page, "voila-two-runs")


def folders(places: dict[str, str]) -> set[str]:
    """What the store of retrained runs holds, half-written ones too."""
    folder = Path(places["HADAMARD_RETRAINED"])
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def contrast(page: Page) -> float:
    """Luminance of the words of the table less that of what is behind them, from -1 to 1."""
    ink, ground = page.evaluate(
        "() => { const t = document.querySelector('.hp-scores td'); let g = t; "
        "while (getComputedStyle(g).backgroundColor === 'rgba(0, 0, 0, 0)' && g.parentElement) g = g.parentElement; "
        "return [getComputedStyle(t).color, getComputedStyle(g).backgroundColor] }"
    )
    return luminance(ink) - luminance(ground)


def luminance(colour: str) -> float:
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.fixture
def no_figures(places: dict[str, str]) -> None:
    """None of an earlier session."""
    for file in Path(places["HADAMARD_FIGURES"]).glob("*"):
        file.unlink()


def test_jupyterlab(
    page: Page, lab: str, headless: Headless, places: dict[str, str], no_figures: None
) -> None:
    page.goto(lab, wait_until="commit")
    page.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for()
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    opened(page)
    drive(page, headless, places)
    assert contrast(page) < -0.5, "dark on light"
    screenshot(page, "lab-light")
    page.get_by_role("menuitem", name="Settings").click()
    for words in ("Theme", "JupyterLab Dark"):
        page.locator(".lm-Menu-itemLabel").get_by_text(words, exact=True).click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", "JupyterLab Dark")
    expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    page.locator(".hp-scores").scroll_into_view_if_needed()
    assert contrast(page) > 0.5, "light on dark"
    screenshot(page, "lab-dark")


def test_the_study_itself_as_an_app(page: Page, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page.goto(study, wait_until="commit")
    opened(page)
    page.get_by_role("button", name="Copy as code").click()
    [key] = re.findall(r"\.run\('(\w+)'\)", page.get_by_label("Code", exact=True).input_value())
    page.get_by_role("button", name="Undo", exact=True).click()  # the preset that the notebook applied
    for name in ("HADAMARD_DATA", "HADAMARD_CACHE"):  # not those of the tiny run
        monkeypatch.delenv(name, raising=False)
        if name in BEFORE:
            monkeypatch.setenv(name, BEFORE[name])
    headless = Headless(key, RunStore(STUDY.parents[1] / "data" / "reference_runs"))
    check(page, headless)
    page.get_by_role("button", name="Layer 0: kept").click()
    headless.apply(Toggle(0))
    check(page, headless)
    page.locator(".hadamard-pruner").screenshot(path=SCREENS / "study.png")
