"""Each committed notebook is its script, executed once from top to bottom, and holds nothing of the machine."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import nbformat
import pytest
from nbformat import NotebookNode

from tests.notebooks.tools import tool

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
SIZE_CAP = 1_500_000  # bytes
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|opt|var|Users|private)/")
CHECKED = "nbval-check-output"


def cells_of(notebook: NotebookNode) -> list[tuple[str, str, list[str]]]:
    """What a pair must share, cell by cell."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def text_of(cell: NotebookNode) -> str:
    """The text nbval compares: standard output, and values in plain form and as Markdown."""
    parts = [output.get("text", "") for output in cell.outputs if output.get("name") != "stderr"]
    for kind in ("text/plain", "text/markdown"):
        parts += [output.get("data", {}).get(kind, "") for output in cell.outputs]
    return "".join(parts)


def problems(notebook: NotebookNode) -> list[str]:
    """Everything that is wrong with a committed notebook, in words."""
    code = code_cells(notebook)
    found = []
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernelspec is not python3")
    if "widgets" in notebook.metadata:
        found.append("widget state is stored")
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(
            f"execution counts are {counts}, not 1 to {len(code)}: not run, or not from top to bottom"
        )
    for number, cell in enumerate(code, start=1):
        where = f"code cell {number}"
        tags = cell.metadata.get("tags", [])
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"{where} stores an error")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"{where} stores something on stderr")
        if "execution" in cell.metadata:
            found.append(f"{where} stores timestamps")
        if "nbval-skip" in tags or "NBVAL_SKIP" in cell.source:
            found.append(f"{where} is skipped by nbval")
        if "NBVAL_" in cell.source:
            found.append(f"{where} steers nbval by a comment; use tags")
        if ABSOLUTE_PATH.search(str(cell.source) + text_of(cell)):
            found.append(f"{where} holds an absolute path")
        if CHECKED in tags and not text_of(cell).strip():
            found.append(f"{where} is tagged {CHECKED} and prints nothing")
    if sum(CHECKED in cell.metadata.get("tags", []) for cell in code) < 2:
        found.append(f"fewer than two cells are tagged {CHECKED}")
    return found


def test_there_are_notebooks_and_every_one_has_its_pair() -> None:
    assert SCRIPTS, "no notebooks/NN_name.py: the notebook tests would check nothing"
    scripts = {path.stem for path in SCRIPTS}
    notebooks = {path.stem for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert scripts == notebooks


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_committed_notebook(script: Path) -> None:
    target = script.with_suffix(".ipynb")
    notebook = nbformat.read(target, as_version=4)
    nbformat.validate(notebook)
    assert cells_of(notebook) == cells_of(jupytext.read(script)), "the pair differs: run `make notebooks`"
    assert problems(notebook) == []
    assert target.stat().st_size <= SIZE_CAP


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return tool("build_notebook")


SCRIPT = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A toy

# %%
total = sum(range(10))

# %% tags=["nbval-check-output"]
print("total", total)

# %% tags=["nbval-check-output"]
{"half": total / 2}

# %%
"""


def test_a_built_notebook_is_clean_and_built_twice_the_same(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND")
    script, target = tmp_path / "00_toy.py", tmp_path / "00_toy.ipynb"
    script.write_text(SCRIPT)
    build.build(script, target)
    first = target.read_bytes()
    notebook: Any = nbformat.read(target, as_version=4)
    assert problems(notebook) == []
    assert cells_of(notebook) == cells_of(jupytext.read(script))
    assert text_of(notebook.cells[2]) == "total 45\n"
    build.build(script, target)
    assert target.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_toy.ipynb", "00_toy.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebooks_leave_statistics_to_the_studies(script: Path) -> None:
    """An interval of a notebook's own has no documented coverage: `studies.mean_over` and its siblings have."""
    found = re.findall(r"default_rng|quantile|ttest\w*|scipy\.stats|bootstrap\(", script.read_text())
    assert not found, f"{script.name} computes statistics by itself: {', '.join(found)}"


def test_a_cell_keeps_its_id_when_another_is_put_before_it(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "00_toy.py"
    script.write_text(SCRIPT)
    before = [cell.id for cell in build.read_script(script).cells]
    script.write_text(SCRIPT.replace("# %%\ntotal", "# %%\nimport math\n\n# %%\ntotal"))
    after = [cell.id for cell in build.read_script(script).cells]
    assert len(after) == len(before) + 1
    assert set(before) < set(after)


def good() -> NotebookNode:
    """A notebook without problems, to be spoilt."""
    tags = {"tags": [CHECKED]}
    new = nbformat.v4
    output = new.new_output("stream", name="stdout", text="1\n")
    cells = [
        new.new_code_cell("print(1)", execution_count=1, outputs=[output], metadata=tags),
        new.new_code_cell("print(1)", execution_count=2, outputs=[output], metadata=tags),
    ]
    return new.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def never_run(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.execution_count, cell.outputs = None, []


def out_of_order(notebook: NotebookNode) -> None:
    notebook.cells[0].execution_count = 3


def failed(notebook: NotebookNode) -> None:
    notebook.cells[0].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]


def stored_state(notebook: NotebookNode) -> None:
    notebook.metadata["widgets"] = {}


def path_of_the_machine(notebook: NotebookNode) -> None:
    notebook.cells[1].outputs[0].text = "saved to /home/someone/figures\n"


def skipped(notebook: NotebookNode) -> None:
    notebook.cells[1].metadata["tags"] = ["nbval-skip"]


def other_kernel(notebook: NotebookNode) -> None:
    notebook.metadata["kernelspec"]["name"] = "my-env"


def warned(notebook: NotebookNode) -> None:
    notebook.cells[1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="careful"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (never_run, "not run"),
        (out_of_order, "not from top to bottom"),
        (failed, "stores an error"),
        (stored_state, "widget state"),
        (path_of_the_machine, "absolute path"),
        (skipped, "skipped by nbval"),
        (other_kernel, "kernelspec"),
        (warned, "stderr"),
    ],
)
def test_what_hygiene_catches(spoil: Any, said: str) -> None:
    notebook = good()
    assert problems(notebook) == []
    spoil(notebook)
    assert any(said in problem for problem in problems(notebook))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pictures_lie_beside_the_notebooks(script: Path) -> None:
    """An app of a notebook reads nothing outside of its folder: Voilà would wait for such a picture for ever."""
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", script.read_text("utf-8").replace("\n# ", " ")):
        path = (FOLDER / picture).resolve()
        assert path.is_file(), picture
        assert path.is_relative_to(FOLDER), picture
