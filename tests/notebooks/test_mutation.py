"""The proof that the notebook check checks: a stored output with one changed value makes nbval fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
CHECKED = "nbval-check-output"
TOY = [
    ("value = 2 / 3", None),
    ("print('share', round(value, 2), 'on', hex(id(value)))", "share 0.67 on 0x7f1234567890\n"),
    ("print('n =', 3)", "n = 3\n"),
]


def notebook_of(cells: list[tuple[str, str | None]]) -> NotebookNode:
    """An executed notebook: code with the text it printed; cells that have a text are checked."""
    new = nbformat.v4
    made = []
    for count, (source, text) in enumerate(cells, start=1):
        outputs = [] if text is None else [new.new_output("stream", name="stdout", text=text)]
        tags = {} if text is None else {"tags": [CHECKED]}
        made.append(new.new_code_cell(source, execution_count=count, outputs=outputs, metadata=tags))
    return new.new_notebook(
        cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def nbval(folder: Path, notebook: NotebookNode) -> tuple[int, dict[str, int], str]:
    """Run nbval as `make nbval` does; give the exit status, the closing counts and all it said."""
    target = folder / "notebooks"
    target.mkdir()
    for name in ("conftest.py", "sanitize.cfg", "nbval.args"):
        shutil.copy(FOLDER / name, target)
    shutil.copy(FOLDER.parent / "pyproject.toml", folder)
    nbformat.write(notebook, target / "00_copy.ipynb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "notebooks", "@notebooks/nbval.args"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])
    }
    return done.returncode, counts, said


def test_a_changed_number_in_a_rendered_sentence_fails(tmp_path: Path) -> None:
    """A finding is Markdown with computed numbers, and that is compared, not the name of the object that holds it."""
    notebook = notebook_of(
        [("from IPython.display import Markdown\nMarkdown(f'**{2 / 3:.2f}** points')", "")]
    )
    data = {"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": "**0.67** points"}
    notebook.cells[0].outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    for folder, text, counts in (("right", "0.67", {"passed": 1}), ("wrong", "0.68", {"failed": 1})):
        (tmp_path / folder).mkdir()
        notebook.cells[0].outputs[0].data["text/markdown"] = f"**{text}** points"
        status, found, said = nbval(tmp_path / folder, notebook)
        assert (status, found) == (int(folder == "wrong"), counts), said


def corrupt(text: str) -> str:
    """The text with its last digit outside an address changed; without digits, with a word too many."""
    digits = list(re.finditer(r"\d", re.sub(r"0x[0-9a-f]+", lambda m: "x" * len(m[0]), text)))
    if not digits:
        return text + "x\n"
    at = digits[-1].start()
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


def test_the_unbroken_copy_passes(tmp_path: Path) -> None:
    status, counts, said = nbval(tmp_path, notebook_of(TOY))
    assert (status, counts) == (0, {"passed": 3}), said


def test_a_changed_value_fails_and_only_there(tmp_path: Path) -> None:
    broken = [(source, text and text.replace("0.67", "0.68")) for source, text in TOY]
    status, counts, said = nbval(tmp_path, notebook_of(broken))
    assert (status, counts) == (1, {"failed": 1, "passed": 2}), said


def checked_outputs() -> list[str]:
    """The text of every checked cell of the committed notebooks."""
    texts = []
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if CHECKED in cell.metadata.get("tags", []):
                shown = [o.get("data", {}) for o in cell.outputs]
                values = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
                values = [data.get("text/markdown", value) for data, value in zip(shown, values, strict=True)]
                texts += [value for value in values if value.strip()]
    return texts


def test_no_committed_result_is_hidden_by_the_sanitiser(tmp_path: Path) -> None:
    """Cells that print what the real ones printed, against stored copies with one digit changed: all must fail.

    This needs no training, and shows that neither `sanitize.cfg` nor the list of outputs left out swallows a result.
    """
    texts = checked_outputs()
    assert len(texts) >= 2, "no checked cells in notebooks/*.ipynb"
    cells = [(f"print({text!r}, end='')", text) for text in texts]
    for folder in ("right", "wrong"):
        (tmp_path / folder).mkdir()
    status, counts, said = nbval(tmp_path / "right", notebook_of(cells))
    assert (status, counts) == (0, {"passed": len(texts)}), said
    status, counts, said = nbval(
        tmp_path / "wrong", notebook_of([(source, corrupt(text)) for source, text in cells])
    )
    assert (status, counts) == (1, {"failed": len(texts)}), said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("accuracy 0.91", "accuracy 0.92"),
        ("at 0x7f00aa11bb22 n=3", "at 0x7f00aa11bb22 n=4"),
        ("pruned", "prunedx\n"),
    ],
)
def test_corrupt_changes_a_value_and_no_address(before: str, after: str) -> None:
    assert corrupt(before) == after
