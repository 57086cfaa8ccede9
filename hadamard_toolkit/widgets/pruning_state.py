"""The state of the layer pruner without a widget: which parts of an adapter are kept, and the history of that.

A `PruningState` is immutable and hashable. An event goes in, a new state comes out; nothing here knows a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_range

LayerSite = tuple[int, str]  # layer and site, as in adapters.parts, which needs torch
FORMAT = 1
LONGEST_PAST = 500  # states that undo reaches back to
PRESETS = ("all", "none", "top-k", "bottom half", "top half", "paper")
PAPER_SHARE = 8 / 12  # of the layers, that the Hadamard adapter's authors keep in their smaller version


# events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toggle:
    """Flip one site of a layer; without a site the layer: pruned if anything of it is kept, else kept."""

    layer: int
    site: str | None = None


@dataclass(frozen=True)
class Keep:
    """Keep these layers (or layers and sites) and no others."""

    kept: tuple[int | LayerSite, ...]


@dataclass(frozen=True)
class Range:
    """Keep what a text says, such as `"0-3,7"`; see `parse_range`."""

    text: str


@dataclass(frozen=True)
class Threshold:
    """Keep the parts whose importance is at least `value`."""

    value: float


@dataclass(frozen=True)
class Preset:
    """Keep what a rule says: one of `PRESETS`; `k` is the number of layers of `"top-k"`."""

    name: str
    k: int | None = None


@dataclass(frozen=True)
class Undo:
    """Go back to the state before the last change; nothing where there is none."""


@dataclass(frozen=True)
class Redo:
    """Take back the last `Undo`; nothing where there is none."""


@dataclass(frozen=True)
class Reset:
    """Keep everything again. It can be undone."""


Event = Toggle | Keep | Range | Threshold | Preset | Undo | Redo | Reset
View = tuple[frozenset[LayerSite], float | None]


# state ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruningState:
    """Which parts of an adapter are kept.

    Attributes
    ----------
    places: every part that there is, as (layer, site), by layer.
    importance: one number per place, larger is more important; of a layer, the sum over its sites.
    kept: the places that are kept. threshold: the value of the last `Threshold`, None after any other change.
    past, future: what `Undo` and `Redo` go to, the nearest last.

    Make one with `PruningState.of`.
    """

    places: tuple[LayerSite, ...]
    importance: tuple[float, ...]
    kept: frozenset[LayerSite]
    threshold: float | None = None
    past: tuple[View, ...] = ()
    future: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        if not self.places or len(set(self.places)) < len(self.places):
            raise ArgumentError(f"places={self.places!r} is not allowed; give at least one, each once")
        if len(self.importance) != len(self.places) or not all(map(math.isfinite, self.importance)):
            raise ArgumentError(
                f"importance={self.importance!r} is not allowed; give one finite number for each of "
                f"{len(self.places)} places"
            )
        if strange := self.kept - set(self.places):
            raise ArgumentError(f"kept={sorted(strange)!r} is not allowed; there is no such place")

    @classmethod
    def of(
        cls,
        places: Iterable[LayerSite] | int,
        importance: Mapping[LayerSite, float] | Iterable[float] | None = None,
    ) -> Self:
        """Everything kept. `places` is the number of layers where there is one site each (`attention_output`).

        `importance` is a number per place, in their order or by place; without it all parts count the same.
        """
        if isinstance(places, int):
            check_range("places", places, least=1)
            places = [(layer, "attention_output") for layer in range(places)]
        listed = tuple((int(layer), str(site)) for layer, site in places)
        if importance is None:
            values: Iterable[float] = [1.0] * len(listed)
        elif isinstance(importance, Mapping):
            values = [importance[place] for place in listed]
        else:
            values = importance
        return cls(listed, tuple(float(value) for value in values), frozenset(listed))

    # reading ---------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that carry something, ascending."""
        return tuple(sorted({layer for layer, _ in self.places}))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in the order in which they first appear."""
        return tuple(dict.fromkeys(site for _, site in self.places))

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers of which anything is kept, ascending."""
        return tuple(sorted({layer for layer, _ in self.kept}))

    @property
    def whole_layers(self) -> bool:
        """Whether every layer is kept wholly or not at all."""
        return all(place in self.kept for place in self.places if place[0] in self.kept_layers)

    @property
    def by_importance(self) -> tuple[int, ...]:
        """The layers, the most important first; of equals the lower one."""
        totals = dict.fromkeys(self.layers, 0.0)
        for (layer, _), value in zip(self.places, self.importance, strict=True):
            totals[layer] += value
        return tuple(sorted(totals, key=lambda layer: (-totals[layer], layer)))

    @property
    def range_text(self) -> str:
        """What is kept, in the words of `parse_range`: `"0-3,7"`, `"0,2:attention_norm"`, `"none"`."""
        return format_range(self.kept, self.places)

    @property
    def can_undo(self) -> bool:
        return bool(self.past)

    @property
    def can_redo(self) -> bool:
        return bool(self.future)

    # events ----------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> Self:
        """The state after `event`; the same state where it changes nothing.

        `ArgumentError` for an event that makes no sense.
        """
        match event:
            case Undo():
                return self._travel(self.past, -1)
            case Redo():
                return self._travel(self.future, 1)
            case Reset():
                return self._to(frozenset(self.places))
            case Toggle(layer, site):
                return self._to(self.kept ^ self._flipped(layer, site))
            case Keep(kept):
                return self._to(self._named(kept))
            case Range(text):
                return self._to(parse_range(text, self.places))
            case Threshold(value):
                check_range("threshold", value, above=-math.inf, below=math.inf)
                pairs = zip(self.places, self.importance, strict=True)
                return self._to(frozenset(place for place, number in pairs if number >= value), float(value))
            case Preset(name, k):
                return self._to(self._named(self._chosen(name, k)))
        raise ArgumentError(
            f"event={event!r} is not allowed; give a Toggle, Keep, Range, Threshold, Preset, Undo, …"
        )

    def _to(self, kept: frozenset[LayerSite], threshold: float | None = None) -> Self:
        if (kept, threshold) == (self.kept, self.threshold):
            return self
        past = (*self.past, (self.kept, self.threshold))[-LONGEST_PAST:]
        return replace(self, kept=kept, threshold=threshold, past=past, future=())

    def _travel(self, where: tuple[View, ...], direction: int) -> Self:
        if not where:
            return self
        (kept, threshold), here = where[-1], (self.kept, self.threshold)
        past, future = self.past, self.future
        past, future = (past[:-1], (*future, here)) if direction < 0 else ((*past, here), future[:-1])
        return replace(self, kept=kept, threshold=threshold, past=past, future=future)

    def _flipped(self, layer: int, site: str | None) -> frozenset[LayerSite]:
        if site is not None:
            return self._named([(layer, site)])
        whole = self._named([layer])
        return whole & self.kept or whole

    def _named(self, kept: Iterable[int | LayerSite]) -> frozenset[LayerSite]:
        chosen: set[LayerSite] = set()
        for item in kept:
            here = [p for p in self.places if p == item or p[0] == item]
            if not here:
                layers = format_range(self.places, self.places)
                raise ArgumentError(
                    f"kept={item!r} is not allowed; there are layers {layers} with sites {', '.join(self.sites)}"
                )
            chosen.update(here)
        return frozenset(chosen)

    def _chosen(self, name: str, k: int | None) -> tuple[int, ...]:
        check_choice("preset", name, PRESETS)
        count, half = len(self.layers), -(-len(self.layers) // 2)
        if name == "top-k":
            if not isinstance(k, int) or isinstance(k, bool):
                raise ArgumentError(f"k={k!r} is not allowed; 'top-k' needs a whole number of layers")
            check_range("k", k, least=0, most=count)
            return self.by_importance[:k]
        return {
            "all": self.layers,
            "none": (),
            "bottom half": self.layers[:half],
            "top half": self.layers[-half:],
            "paper": self.by_importance[: max(1, round(PAPER_SHARE * count))],
        }[name]

    # writing ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back to an equal state, history included."""
        where = {place: index for index, place in enumerate(self.places)}

        def plain(view: View) -> dict[str, Any]:
            return {"kept": sorted(where[place] for place in view[0]), "threshold": view[1]}

        record = {
            "format": FORMAT,
            "places": [list(place) for place in self.places],
            "importance": list(self.importance),
            **plain((self.kept, self.threshold)),
            "past": [plain(view) for view in self.past],
            "future": [plain(view) for view in self.future],
        }
        return json.dumps(record, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The state that `to_json` wrote. `DataError` says what is wrong with a text that is none."""
        try:
            record = json.loads(text)
            check_choice("format", record["format"], [FORMAT])
            places = tuple((int(layer), str(site)) for layer, site in record["places"])

            def rich(view: Mapping[str, Any]) -> View:
                threshold = view["threshold"]
                indices: list[int] = view["kept"]
                if any(index < 0 for index in indices):
                    raise IndexError(min(indices))
                return frozenset(places[index] for index in indices), None if threshold is None else float(
                    threshold
                )

            kept, threshold = rich(record)
            return cls(
                places,
                tuple(float(value) for value in record["importance"]),
                kept,
                threshold,
                tuple(rich(view) for view in record["past"]),
                tuple(rich(view) for view in record["future"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"this text is no pruning state: {type(error).__name__}: {error}") from None

    def as_code(self, *, before: str = "", after: str = "") -> str:
        """Python that gives `kept` and `state` anew, without a screen; `before` and `after` go around it.

        `before` may prepare a run and its evaluation, `after` use `kept` on them; `LayerPruner` passes both.
        """
        kept: Collection[Any] = self.kept_layers if self.whole_layers else sorted(self.kept)
        names = "layers" if self.whole_layers else "(layer, site)"
        lines = [
            "import hadamard_toolkit as ht",
            *([before.rstrip()] if before else []),
            "",
            f"kept = {_source(kept)}  # {names}, {len(self.kept)} of {len(self.places)} parts",
            f"state = ht.PruningState.from_json({self._bare().to_json()!r})",
            *([after.rstrip()] if after else []),
        ]
        return "\n".join(lines) + "\n"

    def _bare(self) -> Self:
        return replace(self, past=(), future=())


def _source(kept: Collection[Any]) -> str:
    inner = ", ".join(f'({item[0]}, "{item[1]}")' if isinstance(item, tuple) else str(item) for item in kept)
    return f"({inner},)" if len(kept) == 1 else f"({inner})"


# ranges in words -----------------------------------------------------------------------------------------------


def parse_range(text: str, places: Collection[LayerSite]) -> frozenset[LayerSite]:
    """The places that a text names: `"0-3,7"` layers, `"2:attention_norm"` one site, `"all"`, `"none"` or nothing.

    Spaces do not matter. A layer without a part is passed over inside a range and refused by itself. `ArgumentError`
    says which piece cannot be read, and what could stand there.
    """
    known = {layer for layer, _ in places}
    low, high = min(known), max(known)
    words = text.strip().lower()
    if words in ("", "none"):
        return frozenset()
    if words == "all":
        return frozenset(places)
    chosen: set[LayerSite] = set()
    for piece in text.split(","):
        span, colon, site = piece.strip().partition(":")
        ends = [end.strip() for end in span.split("-")]
        numbers = [int(end) for end in ends if end.isascii() and end.isdigit()]
        if len(numbers) != len(ends) or len(ends) > 2:
            problem = f"{piece.strip()!r} is no layer" if piece.strip() else "a piece between commas is empty"
            raise ArgumentError(
                f"layers={text!r} is not allowed: {problem}; write layers and ranges such as 0-3,7, or all, or none"
            )
        first, last = numbers[0], numbers[-1]
        if first > last:
            raise ArgumentError(
                f"layers={text!r} is not allowed: the range {span.strip()} runs backwards; write {last}-{first}"
            )
        if outside := [number for number in numbers if not low <= number <= high]:
            raise ArgumentError(
                f"layers={text!r} is not allowed: there is no layer {outside[0]}; layers go from {low} to {high}"
            )
        site = site.strip()
        named = {p for p in places if first <= p[0] <= last and (not colon or p[1] == site)}
        if not named:
            sites = ", ".join(sorted({s for _, s in places}))
            problem = (
                f"there is no site {site!r}; sites are {sites}" if colon else f"layer {first} carries nothing"
            )
            raise ArgumentError(f"layers={text!r} is not allowed: {problem}")
        chosen |= named
    return frozenset(chosen)


def format_range(kept: Collection[LayerSite], places: Collection[LayerSite]) -> str:
    """The shortest text that `parse_range` reads as `kept`: runs of whole layers first, then single sites."""
    if not kept:
        return "none"
    layers = sorted({layer for layer, _ in places})
    whole = [layer for layer in layers if all(p in kept for p in places if p[0] == layer)]
    runs: list[list[int]] = []
    for layer in whole:
        # neighbours among the layers that carry something: what lies between them is passed over
        if runs and layers.index(layer) == layers.index(runs[-1][-1]) + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    pieces = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    pieces += [f"{layer}:{site}" for layer, site in places if (layer, site) in kept and layer not in whole]
    return ",".join(pieces)
