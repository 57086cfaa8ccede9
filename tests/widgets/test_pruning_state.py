"""The state model of the pruner under any sequence of events."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.widgets.pruning_state import (
    PRESETS,
    Event,
    Keep,
    Preset,
    PruningState,
    Range,
    Redo,
    Reset,
    Threshold,
    Toggle,
    Undo,
    format_range,
    parse_range,
)

SITES = ("attention_output", "attention_norm", "ffn_norm")


@st.composite
def states(draw: st.DrawFn) -> PruningState:
    """Some layers of up to nine carry one to three sites."""
    layers = draw(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True).map(sorted))
    places = [(layer, site) for layer in layers for site in SITES[: draw(st.integers(1, 3))]]
    importance = draw(st.lists(st.floats(0, 5), min_size=len(places), max_size=len(places)))
    return PruningState.of(places, importance)


def events(state: PruningState) -> st.SearchStrategy[Event]:
    layer, place = st.sampled_from(state.layers), st.sampled_from(state.places)
    kept = st.frozensets(place)
    return st.one_of(
        layer.map(Toggle),
        place.map(lambda at: Toggle(*at)),
        kept.map(lambda chosen: Keep(tuple(sorted(chosen)))),
        kept.map(lambda chosen: Range(format_range(chosen, state.places))),
        st.floats(-1, 6).map(Threshold),
        st.sampled_from([Preset(name) for name in PRESETS if name != "top-k"]),
        st.integers(0, len(state.layers)).map(lambda k: Preset("top-k", k)),
        st.sampled_from([Undo(), Undo(), Redo(), Reset()]),
    )


histories = states().flatmap(lambda state: st.tuples(st.just(state), st.lists(events(state), max_size=25)))


def view(state: PruningState) -> object:
    return state.kept, state.threshold


@given(histories)
def test_any_sequence_of_events(history: tuple[PruningState, list[Event]]) -> None:
    """Against a model of undo that is as plain as can be: a list of views and a cursor."""
    state, line = history
    start = state
    views, cursor = [view(state)], 0
    for event in line:
        before, hashed = dataclasses.replace(state), hash(state)
        after = state.apply(event)
        assert state == before
        assert hash(state) == hashed
        if isinstance(event, Undo):
            cursor = max(0, cursor - 1)
        elif isinstance(event, Redo):
            cursor = min(len(views) - 1, cursor + 1)
        elif view(after) != view(state):
            views, cursor = [*views[: cursor + 1], view(after)], cursor + 1
            assert view(after.apply(Undo())) == view(state), "undo returns"
            assert after.apply(Undo()).apply(Redo()) == after
        else:
            assert after is state, "what changes nothing leaves no trace"
        state = after
        assert view(state) == views[cursor]
        assert (state.can_undo, state.can_redo) == (cursor > 0, cursor < len(views) - 1)
        assert state.kept <= set(state.places)
        assert parse_range(state.range_text, state.places) == state.kept
        assert PruningState.from_json(state.to_json()) == state
    while state.can_undo:
        state = state.apply(Undo())
    assert view(state) == view(start)
    while state.can_redo:
        state = state.apply(Redo())
    assert view(state) == views[-1]


@given(histories)
def test_equal_states_are_one_key(history: tuple[PruningState, list[Event]]) -> None:
    state, line = history
    other = PruningState.from_json(state.to_json())
    for event in line:
        state, other = state.apply(event), other.apply(event)
    assert state == other
    assert len({state, other}) == 1


@given(histories)
def test_code_gives_what_is_kept(history: tuple[PruningState, list[Event]]) -> None:
    state, line = history
    for event in line:
        state = state.apply(event)
    names: dict[str, object] = {}
    exec(state.as_code(before="first = 1", after="last = kept"), names)
    again = names["state"]
    assert isinstance(again, PruningState)
    assert view(again) == view(state)
    assert again.apply(Keep(names["kept"])).kept == state.kept  # type: ignore[arg-type]
    assert (names["first"], names["last"]) == (1, names["kept"])


@given(states(), st.text(alphabet="0123456789-,: anoe", max_size=12))
def test_a_range_is_read_or_refused_in_words(state: PruningState, text: str) -> None:
    said = ""
    try:
        kept = parse_range(text, state.places)
    except ArgumentError as error:
        said = str(error)
    if said:
        assert said.startswith(f"layers={text!r} is not allowed: ")
    else:
        assert kept <= set(state.places)
        assert state.apply(Range(text)).kept == kept


TWELVE = [(layer, "attention_output") for layer in range(12)]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3,7", [0, 1, 2, 3, 7]),
        (" 0 - 3 , 7 ", [0, 1, 2, 3, 7]),
        ("11", [11]),
        ("5,5,4-6", [4, 5, 6]),
        ("all", list(range(12))),
        ("None", []),
        ("", []),
    ],
)
def test_ranges(text: str, layers: list[int]) -> None:
    assert sorted(layer for layer, _ in parse_range(text, TWELVE)) == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-x", "'0-x' is no layer; write layers and ranges such as 0-3,7"),
        ("0,,3", "a piece between commas is empty"),
        ("1-2-3", "'1-2-3' is no layer"),
        ("-1", "'-1' is no layer"),
        ("²", "'²' is no layer"),
        ("3-1", "runs backwards; write 1-3"),
        ("4,12", "there is no layer 12; layers go from 0 to 11"),
        ("3:query", "there is no site 'query'; sites are attention_output"),
    ],
)
def test_a_wrong_range_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match="is not allowed") as raised:
        parse_range(text, TWELVE)
    assert said in str(raised.value)


def test_layers_that_carry_nothing_are_passed_over_in_a_range_and_refused_alone() -> None:
    places = [(0, "attention_output"), (2, "attention_output"), (5, "attention_output")]
    assert parse_range("0-5", places) == set(places)
    assert format_range(places, places) == "0-5"
    with pytest.raises(ArgumentError, match="layer 1 carries nothing"):
        parse_range("1", places)


def test_presets() -> None:
    state = PruningState.of(12, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    assert state.by_importance == (5, 11, 7, 4, 8, 10, 2, 0, 9, 6, 1, 3)  # of equals the lower one
    kept = {name: state.apply(Preset(name)).kept_layers for name in PRESETS if name != "top-k"}
    assert kept == {
        "all": tuple(range(12)),
        "none": (),
        "bottom half": (0, 1, 2, 3, 4, 5),
        "top half": (6, 7, 8, 9, 10, 11),
        "paper": (0, 2, 4, 5, 7, 8, 10, 11),  # 8 of 12
    }
    assert state.apply(Preset("top-k", 3)).kept_layers == (5, 7, 11)
    six = PruningState.of(6)
    assert len(six.apply(Preset("paper")).kept_layers) == 4
    assert len(PruningState.of(2).apply(Preset("paper")).kept_layers) == 1
    assert state.apply(Threshold(5)).kept_layers == (4, 5, 7, 8, 10, 11)


def test_a_layer_is_the_sum_of_its_sites_and_toggles_as_one() -> None:
    places = [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    state = PruningState.of(places, {(0, "a"): 3.0, (0, "b"): 0.0, (1, "a"): 2.0, (1, "b"): 2.0})
    assert state.by_importance == (1, 0)
    half = state.apply(Toggle(0, "b"))
    assert half.kept_layers == (0, 1)
    assert not half.whole_layers
    assert half.range_text == "1,0:a"
    assert half.apply(Toggle(0)).kept_layers == (1,)
    assert half.apply(Toggle(0)).apply(Toggle(0)).kept == state.kept


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Toggle(12), "kept=12 is not allowed; there are layers 0-11 with sites attention_output"),
        (Toggle(0, "query"), r"kept=\(0, 'query'\)"),
        (Keep((3, 99)), "kept=99"),
        (Preset("best"), "preset='best' is not allowed; choose one of 'all', 'none'"),
        (Preset("top-k"), "k=None is not allowed"),
        (Preset("top-k", 13), "k=13"),
        (Threshold(float("nan")), "threshold=nan"),
        ("toggle", "event='toggle' is not allowed"),
    ],
)
def test_events_that_make_no_sense_are_refused(event: Event, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        PruningState.of(12).apply(event)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", PruningState.of(2).to_json().replace('"format":1', '"format":2'),
     PruningState.of(2).to_json().replace('"kept":[0,1]', '"kept":[0,2]'),
     PruningState.of(2).to_json().replace('"kept":[0,1]', '"kept":[-1]'),
     PruningState.of(2).to_json().replace('"importance":[1.0,1.0]', '"importance":[1.0]')],
)  # fmt: skip
def test_a_text_that_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no pruning state"):
        PruningState.from_json(text)


def test_no_model_is_needed() -> None:
    """The state model loads in a process without torch and without widgets."""
    code = (
        "import sys; import hadamard_toolkit.widgets.pruning_state; "
        "print([name for name in ('torch', 'ipywidgets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("places", "importance", "kept", "said"),
    [
        ((), (), (), "give at least one, each once"),
        (((0, "a"), (0, "a")), (1.0, 1.0), (), "give at least one, each once"),
        (((0, "a"), (1, "a")), (1.0,), (), "give one finite number for each of 2 places"),
        (((0, "a"),), (float("inf"),), (), "give one finite number for each of 1 places"),
        (((0, "a"),), (1.0,), ((0, "b"),), r"kept=\[\(0, 'b'\)\] is not allowed; there is no such place"),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    places: tuple[tuple[int, str], ...],
    importance: tuple[float, ...],
    kept: tuple[tuple[int, str], ...],
    said: str,
) -> None:
    with pytest.raises(ArgumentError, match=said):
        PruningState(places, importance, frozenset(kept))
