from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.runs import estimate as module
from hadamard_toolkit.runs.estimate import duration, estimate
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

MakeSpec = Callable[..., RunSpec]
SEED, METHOD, SIZE = module.LIKE.values()


@pytest.fixture(autouse=True)
def no_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFERENCE", tmp_path / "nowhere")


@pytest.fixture
def done(make_spec: MakeSpec, tmp_path: Path) -> RunStore:
    """A store in which HeadOnly took 10, 20 and 60 seconds with seeds 0 to 2, on this machine."""
    store, spec = RunStore(tmp_path / "runs"), make_spec(adapter=ht.HeadOnly())
    run(spec, store)
    text = (store.folder / spec.key / "run.json").read_text()
    for seed, seconds in enumerate((10, 20, 60)):
        own = replace(spec, seed=seed)
        record = json.loads(text) | {"key": own.key, "spec": own.to_dict()}
        record["times"]["total"] = seconds
        (store.folder / own.key).mkdir(exist_ok=True)
        (store.folder / own.key / "run.json").write_text(json.dumps(record))
    return store


def test_a_run_with_another_seed_takes_the_median_time(done: RunStore, make_spec: MakeSpec) -> None:
    found = estimate([make_spec(adapter=ht.HeadOnly(), seed=seed) for seed in (7, 8, 9)], done)
    assert (found.seconds, found.rests_on, found.unknown) == (60, {SEED: 3}, 0)
    assert found.words() == "about 60 s on this machine (3 from runs with another seed)"
    assert found.words(workers=2) == "about 30 s on this machine, 2 at a time (3 from runs with another seed)"


def test_the_closest_runs_count_and_what_is_like_none_is_not_counted(
    done: RunStore, make_spec: MakeSpec
) -> None:
    small = make_spec().protocol
    assert (small.train_rows, small.epochs, small.head_epochs) == (48, 1, 2)
    more = replace(small, train_rows=96, epochs=4)  # twice the rows, and 2 + 4 epochs for 2 + 1
    specs = [
        make_spec(adapter=ht.LoRA()),
        make_spec(adapter=ht.HeadOnly(), protocol=more),
        make_spec(adapter=ht.LoRA(), protocol=more),
        make_spec(adapter=ht.HeadOnly(), protocol=replace(small, train_rows=None)),
    ]
    found = estimate(specs, done)
    assert found.seconds == pytest.approx(20 + 2 * 2 * 20)
    assert (found.rests_on, found.unknown) == ({METHOD: 1, SIZE: 1}, 2)
    assert "2 like nothing that is recorded, so not counted" in found.words()


def test_times_of_another_machine_are_called_so_and_give_way_to_own_ones(
    done: RunStore, make_spec: MakeSpec
) -> None:
    spec = make_spec(adapter=ht.HeadOnly(), seed=5)
    own, *foreign = done.keys()
    for key in foreign:
        path = done.folder / key / "run.json"
        record = json.loads(path.read_text())
        record["meta_info"]["device"]["device_name"] = "Big GPU"
        path.write_text(json.dumps(record))
    assert estimate([spec], done).seconds == done.load().set_index("key").loc[own, "seconds"].iloc[0]
    (done.folder / own / "run.json").unlink()
    with pytest.warns(UserWarning, match=own):
        words = estimate([spec], done).words()
    assert "on Big GPU; none is recorded here" in words


def test_nothing_recorded_is_said_and_not_guessed(make_spec: MakeSpec, tmp_path: Path) -> None:
    found = estimate([make_spec()], RunStore(tmp_path / "none yet"))
    assert (found.seconds, found.unknown) == (0, 1)
    assert found.words() == "no estimate: nothing like these runs is recorded yet"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (120, "2 min"), (7300, "2 h 2 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
