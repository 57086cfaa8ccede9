"""The app around the pruner, and the command that serves it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from voila.app import Voila

from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import ArgumentError, DataError
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets import app
from hadamard_toolkit.widgets.pruner import LayerPruner


def test_the_app_offers_the_runs_of_a_store(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HADAMARD_STORE", str(store.folder))
    monkeypatch.setenv("HADAMARD_RUN", store.keys()[1])
    monkeypatch.setenv("HADAMARD_RETRAINED", str(tmp_path))
    choose, _, pruner = app.pruner_app().children
    assert isinstance(pruner, LayerPruner)
    assert choose.value == store.keys()[1] == pruner.specs[0].key
    assert pruner._store.folder == tmp_path


def test_the_menu_says_what_was_trained_and_how_well(store: RunStore) -> None:
    shown = app.prunable(store)
    table = store.load().query("headline and split == 'test'").set_index("key")
    assert {*shown["key"]} == {*store.keys()}
    for row in shown.itertuples():
        value = table.loc[row.key, "value"]
        told = f"sst2, Hadamard(), seed {row.seed}, 64 rows: test accuracy {value:.3f} ({row.key[:6]})"
        assert row.words == told


def test_it_opens_with_what_was_tried_most_where_the_data_are_at_hand() -> None:
    rows = [
        ("a", "mpnet-base", "embedded/tweets-polarity", "Hadamard()"),
        ("b", "minilm-l6", "cola", "BitFit()"),
        ("c", "minilm-l6", "cola", "BitFit()"),
        ("d", "minilm-l6", "embedded/movies-polarity", "BitFit()"),
        ("e", "minilm-l6", "embedded/tweets-polarity", "BitFit()"),
        ("f", "minilm-l6", "embedded/tweets-polarity", "Hadamard()"),
        ("g", "minilm-l6", "embedded/tweets-polarity", "Hadamard()"),
        ("h", "minilm-l6", "cola", "Hadamard()"),
        ("i", "minilm-l6", "cola", "Hadamard()"),
        ("j", "minilm-l6", "cola", "Hadamard()"),
    ]
    shown = pd.DataFrame(rows, columns=["key", "backbone", "task", "label"])
    assert app.to_begin_with(shown) == "f"
    assert app.to_begin_with(shown[shown["task"] == "cola"]) == "h"


def test_two_runs_side_by_side(store: RunStore) -> None:
    box = app.pruner_app(store.folder, store.keys()[0])
    first = box.children[2]
    box.children[1].value = store.keys()[1]
    assert [spec.key for spec in box.children[2].specs] == store.keys()
    assert first._closed


@pytest.mark.parametrize(
    ("folder", "words"), [("typo", "typo&#x27; is not there"), ("", "holds no run whose weights were kept")]
)
def test_a_store_without_runs_says_so_in_the_view(tmp_path: Path, folder: str, words: str) -> None:
    [said] = app.pruner_app(tmp_path / folder).children
    assert words in said.value


def test_the_command(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    monkeypatch.setattr(
        app, "_become", lambda command, environment: called.append((command, environment)) or 0
    )
    monkeypatch.setenv("HADAMARD_RETRAINED", "~/runs")
    key = store.keys()[0]
    assert (
        main(["pruner", "--store", str(store.folder), "--run", key[:8], "--port", "8123", "--no-browser"])
        == 0
    )
    [(command, environment)] = called
    assert command[1:4] == ["-m", "voila", str(app.NOTEBOOK)]
    assert {"--port=8123", "--no-browser", "--Voila.ip=127.0.0.1"} <= set(command)
    voila = Voila()
    voila.parse_command_line(command[4:])
    kernels = AsyncMappingKernelManager(config=voila.config)  # the class that Voilà's own derives from
    assert 0 < kernels.cull_interval <= kernels.cull_idle_timeout <= 600  # minutes after the page has gone
    assert not kernels.cull_connected  # and never before
    assert environment["HADAMARD_RUN"] == key
    assert Path(environment["HADAMARD_RETRAINED"]) == (Path.home() / "runs").resolve()
    assert Path(environment["HADAMARD_STORE"]) == store.folder.resolve()
    assert main(["pruner", "--store", str(store.folder / "nowhere")]) == 2
    assert "nowhere' is not there" in capsys.readouterr().err
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert main(["pruner", "--store", str(store.folder)]) == 2
    assert "pip install hadamard_toolkit[notebooks]" in capsys.readouterr().err


def test_the_notebook_is_plain_and_without_outputs() -> None:
    notebook = nbformat.read(app.NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert all(not cell.get("outputs") for cell in notebook.cells)


def test_serving_refuses_an_unknown_run(store: RunStore) -> None:
    with pytest.raises(ArgumentError, match="is no run of"):
        app.serve(store.folder, "ffff")
    with pytest.raises(DataError):
        app.serve(store.folder / "nowhere")


def test_a_run_that_cannot_be_opened_says_so_in_the_view(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = store.keys()
    shown = app.prunable(store)
    monkeypatch.setattr(app, "prunable", lambda _: shown[shown["key"] != second])
    [said] = app.pruner_app(store.folder, second).children
    assert "its weights were not kept" in said.value
    assert 'role="alert"' in said.value

    def fail(*_: object, **__: object) -> None:
        raise DataError("its backbone is gone")

    monkeypatch.setattr("hadamard_toolkit.widgets.pruner.LayerPruner", fail)
    *_, said = app.pruner_app(store.folder, first).children
    assert "its backbone is gone" in said.value
    assert 'role="alert"' in said.value
