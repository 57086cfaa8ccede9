"""The committed figures are those that the committed runs give."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

from hadamard_toolkit import paths
from hadamard_toolkit.cli import main
from hadamard_toolkit.errors import ArgumentError
from tests.notebooks.tools import tool

REPOSITORY = Path(__file__).parents[2]
COMMITTED = REPOSITORY / "figures"
figures = tool("figures")


def test_every_figure_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == list(figures.NOTEBOOKS)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in COMMITTED.iterdir()}, "figures/ holds what the notebooks make"
    for record in sorted(COMMITTED.glob("*.json")):
        committed, again = (
            json.loads((folder / record.name).read_text("utf-8")) for folder in (COMMITTED, tmp_path)
        )
        assert committed["profile"] == "reference"
        assert again["table"]["columns"] == committed["table"]["columns"]
        assert again["table"]["rows"] == committed["table"]["rows"], f"the data of {record.stem}"
        same = again["table"]["sha256"] == committed["table"]["sha256"]
        if not same and "records" in committed["table"]:  # another processor may add up in another order
            pair = [pd.DataFrame(found["table"]["records"]) for found in (again, committed)]
            pd.testing.assert_frame_equal(*pair, rtol=1e-6)
        if same and committed["versions"]["matplotlib"] == mpl.__version__:
            for ending in ("pdf", "png"):
                first, second = (folder / f"{record.stem}.{ending}" for folder in (COMMITTED, tmp_path))
                assert first.read_bytes() == second.read_bytes(), first.name


def test_an_unknown_venue_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"venue='nature'.*neurips"):
        next(iter(figures.draw_all(venue="nature")))


def test_an_installed_package_says_that_figures_need_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    assert main(["figures"]) == 2
    assert capsys.readouterr().err == (
        "hadamard: figures are made by the notebooks of a checkout, and this is none\n"
    )


def test_a_relative_folder_is_that_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    said = "import os, pathlib\nfor name in ('STORE', 'FIGURES'):\n"
    said += "    pathlib.Path('..', name).write_text(os.path.abspath(os.environ['HADAMARD_' + name]))\n"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "one.py").write_text(said)
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setattr(figures, "NOTEBOOKS", ("one",))
    monkeypatch.chdir(tmp_path / "here")
    assert list(figures.draw_all("runs", "drawn")) == ["one"]
    assert (tmp_path / "STORE").read_text() == str(tmp_path / "here" / "runs")
    assert (tmp_path / "FIGURES").read_text() == str(tmp_path / "here" / "drawn")


def test_make_figures_hands_its_options_on() -> None:
    choices = ["STORE=my_runs", "VENUE=slide", "FOLDER=drawn", "VENV=build/none"]
    commands = subprocess.run(
        ["make", "-n", "figures", *choices], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "tools/figures.py --store my_runs --venue slide --folder drawn\n" in commands
