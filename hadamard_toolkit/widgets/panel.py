"""The controls of the pruner: widgets with their values, and the name of what each one asks for. No model, no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import ipywidgets as widgets
import pandas as pd

from hadamard_toolkit.widgets import views
from hadamard_toolkit.widgets.pruning_state import LayerSite, PruningState

_MENU = {
    "k most important": ("top-k", True),
    "greedy, k layers": ("greedy", True),
    "consensus of other tasks, k layers": ("consensus", True),
    "paper's count (8 of 12), most important": ("paper", False),
    "bottom half of the layers": ("bottom half", False),
    "top half of the layers": ("top half", False),
    "everything": ("all", False),
    "nothing": ("none", False),
}
_SITE_NAMES = {
    "attention_output": "vectors",
    "attention_heads": "vectors",
    "attention_norm": "norm",
    "ffn_norm": "ffn norm",
}


class Handler(Protocol):
    """Does what the controls ask for."""

    def handle(self, name: str, value: Any = None) -> None: ...


class Panel:
    """The view in `box`: `sync(state)` sets the controls, the `show_…` methods the texts. It decides nothing."""

    def __init__(self, state: PruningState, handler: Handler) -> None:
        self._handler, self._syncing = handler, False
        self._numbers, self._costs, self._flips = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._code, self._message, self._progress = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.range = widgets.Text(
            value=state.range_text,
            description="Keep layers",
            tooltip="Layers to keep: 0-3,7; one site of a layer: 2:attention_norm; all; none. Enter applies it.",
            placeholder="0-3,7",
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "260px"},
        )
        self.range.observe(self._asks("range"), "value")
        self.menu = widgets.Dropdown(
            options=list(_MENU),
            description="Preset",
            tooltip="A rule that says which layers to keep",
            style={"description_width": "initial"},
            layout={"width": "320px"},
        )
        count = len(state.layers)
        self.k = widgets.BoundedIntText(
            value=-(-2 * count // 3), min=0, max=count, description="k",
            tooltip="How many layers such a preset keeps",
            style={"description_width": "initial"}, layout={"width": "90px"},
        )  # fmt: skip
        self.use = self._button("Apply preset", "preset", "Keep what the preset says", self._chosen)
        top = max(state.importance) or 1.0
        self.threshold = widgets.FloatSlider(
            value=0.0, min=0.0, max=top * 1.001, step=top / 100, readout_format=".3f",
            description="Keep where norm ≥", tooltip="Keep the parts whose importance is at least this",
            continuous_update=False, style={"description_width": "initial"}, layout={"width": "360px"},
        )  # fmt: skip
        self.threshold.observe(self._asks("threshold"), "value")
        self.undo = self._button("Undo", "undo", "Back to the state before the last change")
        self.redo = self._button("Redo", "redo", "Take back the last undo")
        self.reset = self._button("Reset", "reset", "Keep everything again")
        self.ablate = self._button(
            "Leave out one by one", "leave one out", "What the score misses without each part alone"
        )
        self.retrain = self._button(
            "Retrain", "retrain", "Train what is kept anew, in another process, into the run store"
        )
        self.cancel = self._button("Cancel", "cancel", "Stop what is going on")
        self.export = self._button("Export figure", "export", "Write what is shown as .pdf, .png and .json")
        self.cancel.disabled = True
        self.code = widgets.ToggleButton(
            description="Copy as code", tooltip="Python that gives these numbers without a screen",
            layout={"width": "max-content"},
        )  # fmt: skip
        self.code.observe(lambda _: self._show_or_hide_code(), "value")
        self._show_or_hide_code()
        self._rows = {layer: self._row(layer, state) for layer in state.layers}
        self.box = widgets.VBox(
            [
                widgets.HTML(
                    f"{views.STYLE}<h3>Layer pruner</h3><p>A pruned part has the backbone's own values; the head "
                    "stays as trained. Scores are those of the adapter without retraining, unless a row says so.</p>"
                ),
                self._numbers,
                self._costs,
                self._message,
                self._progress,
                self._line(self.range, self.undo, self.redo, self.reset),
                self._line(self.menu, self.k, self.use, self.threshold),
                widgets.VBox([row["box"] for row in self._rows.values()]),
                self._line(self.ablate, self.retrain, self.cancel, self.export, self.code),
                self._code,
                self._flips,
            ]
        )

    @staticmethod
    def _line(*children: widgets.Widget) -> widgets.HBox:
        box = widgets.HBox(list(children))
        box.add_class("hp-controls")
        return box

    def _button(
        self, words: str, name: str, tooltip: str, value: Callable[[], Any] = lambda: None
    ) -> widgets.Button:
        button = widgets.Button(description=words, tooltip=tooltip, layout={"width": "max-content"})
        # `Button.click` swallows exceptions of its callbacks, so `press` is what tests and callbacks share
        button.press = lambda: self._handler.handle(name, value())
        button.on_click(lambda _: button.press())
        return button

    def _asks(self, name: str) -> Callable[[Any], None]:
        def ask(change: Any) -> None:
            if not self._syncing:
                self._handler.handle(name, change["new"])

        return ask

    def _chosen(self) -> tuple[str, int | None]:
        name, counted = _MENU[self.menu.value]
        return name, self.k.value if counted else None

    # layers ----------------------------------------------------------------------------------------------------

    def _row(self, layer: int, state: PruningState) -> dict[str, Any]:
        places = [place for place in state.places if place[0] == layer]
        whole = self._switch((layer, None), f"All that the adapter has in layer {layer}", "165px")
        sites: dict[LayerSite, tuple[widgets.ToggleButton | None, widgets.HTML]] = {}
        children: list[widgets.Widget] = [whole]
        for place in places:
            switch = None
            if len(places) > 1:
                switch = self._switch(place, f"{place[1]} of layer {layer}", "155px")
            bars = widgets.HTML(layout={"width": "184px", "margin": "0 0 0 8px"})
            sites[place] = switch, bars
            # side by side however narrow the page is: bars belong to the switch before them
            children.append(
                widgets.HBox([*([switch] if switch else []), bars], layout={"align_items": "center"})
            )
        box = widgets.HBox(children)
        box.add_class("hp-row")
        return {"box": box, "whole": whole, "sites": sites}

    def _switch(self, place: tuple[int, str | None], tooltip: str, width: str) -> widgets.ToggleButton:
        switch = widgets.ToggleButton(value=True, tooltip=tooltip, layout={"width": width})
        ask = self._asks("toggle")
        switch.observe(lambda change: ask({"new": place}), "value")
        return switch

    def switch(self, layer: int, site: str | None = None) -> widgets.ToggleButton:
        """The switch of a layer, or of one of its sites (where it has several)."""
        row = self._rows[layer]
        return row["whole"] if site is None else row["sites"][layer, site][0]

    # showing ---------------------------------------------------------------------------------------------------

    def sync(self, state: PruningState) -> None:
        """Set every control to `state` without asking the handler for anything."""
        self._syncing = True
        try:
            self.range.value = state.range_text
            if state.threshold is not None:
                self.threshold.value = state.threshold
            self.undo.disabled, self.redo.disabled = not state.can_undo, not state.can_redo
            for layer, row in self._rows.items():
                kept = [place in state.kept for place in row["sites"]]
                words = "kept" if all(kept) else "partly kept" if any(kept) else "pruned"
                self._set(row["whole"], f"Layer {layer}: {words}", any(kept))
                for place, (switch, _) in row["sites"].items():
                    if switch is not None:
                        on = place in state.kept
                        name = _SITE_NAMES.get(place[1], place[1])
                        self._set(switch, f"L{layer} {name}: {'kept' if on else 'pruned'}", on)
        finally:
            self._syncing = False

    @staticmethod
    def _set(switch: widgets.ToggleButton, words: str, on: bool) -> None:
        switch.description, switch.value = words, on
        (switch.remove_class if on else switch.add_class)("hp-pruned")

    def show_evidence(self, table: pd.DataFrame, state: PruningState) -> None:
        """Bars beside the switches, on one scale per kind of norm and kind of site."""
        for site, rows in table.groupby("site"):
            largest = {kind: float(rows[kind].max()) for kind in ("weight", "bias", "importance")}
            for layer in rows["layer"].unique():
                place = int(layer), str(site)
                tasks: list[dict[str, Any]] = rows[rows["layer"] == layer].to_dict("records")
                bars = views.evidence(tasks, largest, kept=place in state.kept)
                self._rows[place[0]]["sites"][place][1].value = bars

    def show_numbers(self, html: str) -> None:
        self._numbers.value = html

    def show_costs(self, html: str) -> None:
        self._costs.value = html

    def show_flips(self, html: str) -> None:
        self._flips.value = html

    def show_code(self, html: str) -> None:
        self._code.value = html

    def _show_or_hide_code(self) -> None:
        self.code.description = "Hide the code" if self.code.value else "Copy as code"
        self._code.layout.display = "" if self.code.value else "none"

    def say(self, text: str, *, error: bool = False) -> None:
        """Show a line under the numbers; an empty text removes it."""
        self._message.value = views.message(text, error=error)

    def progress(self, text: str, share: float | None) -> None:
        """Show a progress bar with `text` and enable Cancel; an empty text ends both."""
        self._progress.value = views.progress(text, share) if text else ""
        self.cancel.disabled = not text
        for button in (self.retrain, self.ablate, self.use):
            button.disabled = bool(text)
