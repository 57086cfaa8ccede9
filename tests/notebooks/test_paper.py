"""The paper profile: what the notebooks train is known before they are executed, and no cell has a limit."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import pytest

from tests.notebooks.tools import tool

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
TRAINING = {"sweep", "run", "train"}


@pytest.fixture(scope="module")
def paper_runs() -> ModuleType:
    return tool("paper_runs")


def calls(source: str) -> list[tuple[str, str]]:
    """Calls of `ht.sweep`, `ht.run` and `ht.train`: the function, and the name that its first argument begins with."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("ht.") in TRAINING:
            names = [part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)]
            found.append((ast.unparse(node.func).removeprefix("ht."), names[-1]))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_all_that_a_notebook_sweeps_is_made_in_cells_that_train_nothing(script: Path) -> None:
    tagged, rest = [], []
    for cell in jupytext.read(script).cells:
        if cell.cell_type == "code":
            (tagged if "runs" in cell.metadata.get("tags", []) else rest).append(cell.source)
    made = {
        target.id
        for source in tagged
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    assert not any(calls(source) for source in tagged)
    swept = [name for source in rest for function, name in calls(source) if function != "train"]
    assert set(swept) <= made
    if swept:
        assert "working_store(profile)" in script.read_text()  # and not a folder that is gone with the kernel
    assert "HADAMARD_STORE" not in script.read_text() or not swept


def test_the_specs_of_a_notebook_are_those_of_its_profile(
    paper_runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_PROFILE", "paper")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path))  # no GLUE: the films alone
    (script,) = [path for path in SCRIPTS if path.stem.startswith("03")]
    specs = paper_runs.specs_of(script)
    films = [spec for spec in specs if spec.task == "embedded/movies-polarity"]
    pretrained = [spec for spec in films if spec.protocol.pretraining]
    assert {spec.protocol.train_rows for spec in films} == {100, 500, 1000}
    assert len(set(films) - set(pretrained)) == 6 * 3 * 5 + 2 * 2 * 5 - 5  # UniPELT with K = 1,000 is in both
    assert len(pretrained) == 3 * 2 * 5
    assert len(set(specs) - set(films)) == 15


TOY = """# %% tags=["runs"]
import hadamard_toolkit as ht

one = ht.RunSpec("minilm-l6", "sst2", ht.HeadOnly(), ht.protocols.smoke())

# %%
raise ValueError("this cell is for the notebook alone")

# %% tags=["runs"]
print("not among what the tool says")
several = [one, *(ht.RunSpec("minilm-l6", "sst2", ht.HeadOnly(), ht.protocols.smoke(), seed=s) for s in (1, 2))]
by_name = {"rte": ht.RunSpec("minilm-l6", "rte", ht.HeadOnly(), ht.protocols.smoke())}
"""


def test_the_runs_of_all_notebooks_are_one_sweep_with_an_estimate(
    paper_runs: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, store = tmp_path / "00_toy.py", tmp_path / "runs"
    script.write_text(TOY)
    monkeypatch.setenv("HADAMARD_STORE", str(store))
    monkeypatch.setenv("HADAMARD_PROFILE", "smoke")
    monkeypatch.setattr(sys, "argv", ["paper_runs.py", str(script), str(script), "--dry-run"])
    assert paper_runs.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        *["00_toy.py: 4 runs"] * 2,
        f"notebooks in the paper profile: 4 runs, 0 in {store}, 4 missing",
    ]
    assert lines[3].startswith(("about ", "no estimate: "))
    assert len(lines) == 4


@pytest.mark.parametrize(("profile", "limit"), [("smoke", 3600), ("paper", None)])
def test_a_cell_of_the_paper_profile_may_take_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, limit: int | None
) -> None:
    build, asked = tool("build_notebook"), {}

    class Client:
        def __init__(self, notebook: Any, **options: Any) -> None:
            asked.update(options)

        def execute(self) -> None:
            pass

    monkeypatch.setattr(build, "NotebookClient", Client)
    monkeypatch.setenv("HADAMARD_PROFILE", profile)
    build.execute(build.read_script(SCRIPTS[0]), tmp_path)
    assert asked["timeout"] == limit


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build, script = tool("build_notebook"), tmp_path / "00_toy.py"
    script.write_text("# %%\nimport os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n")
    for name, value in (("HADAMARD_PROGRESS", "0"), ("MPLBACKEND", "Agg")):  # main changes both
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["build_notebook.py", str(script), str(tmp_path / "00_toy.ipynb")])
    assert build.main() == 130
    assert capfd.readouterr().err == "00_toy.py: interrupted; runs in a lasting store are kept\n"
    assert not (tmp_path / "00_toy.ipynb").exists()
