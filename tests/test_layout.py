"""The tree, the layout in README and docs/design.md, and the imports agree."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "hadamard_toolkit"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
ABOVE = {"hadamard_toolkit.cli", "hadamard_toolkit.cli_sweep"}  # modules above every room
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def blocks(page: str) -> list[str]:
    """The code blocks of a page."""
    text = (REPOSITORY / page).read_text("utf-8")
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def floors() -> list[set[str]]:
    """The rooms of docs/design.md, from the highest floor to the lowest."""
    [block] = [b for b in blocks("docs/design.md") if b.startswith("widgets")]
    return [set(line.split()) for line in block.splitlines()]


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that `module` imports anywhere, also within functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= inner & set(MODULES) or {node.module}
    return frozenset((found & set(MODULES)) - {module})


def room(module: str) -> str:
    """The room of a module, or "" for one that stands in the package itself."""
    second = (*module.split("."), "")[1]
    return second if second in ROOMS else ""


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_layout_names_every_room_and_no_other(page: str) -> None:
    [block] = [b for b in blocks(page) if b.startswith("hadamard_toolkit/")]
    named = set(re.findall(r"(\w+)/", block.partition("\nnotebooks/")[0])) - {"hadamard_toolkit"}
    assert named == ROOMS
    below = re.findall(r"^(\w+)/", block, re.MULTILINE)
    assert all((REPOSITORY / folder).is_dir() for folder in below)
    assert set(below) >= {"hadamard_toolkit", "notebooks", "data", "docs", "figures", "tests", "tools"}


def test_every_room_has_tests_and_every_test_room_a_room() -> None:
    rooms_of_tests = {path.name for path in (REPOSITORY / "tests").iterdir() if path.is_dir()}
    assert rooms_of_tests - {"__pycache__", "benchmarks", "browser", "gpu", "notebooks"} == ROOMS


def test_imports_run_downwards_only() -> None:
    floor = {name: number for number, names in enumerate(floors()) for name in names}
    assert set(floor) == ROOMS
    upwards = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imports(module)
        if room(module) and room(target) != room(module)
        if target in ABOVE or (room(target) and floor[room(target)] <= floor[room(module)])
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()
    packages = {module for module in MODULES if MODULES[module].name == "__init__.py"}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(imports(module) - packages):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(set(MODULES) - packages):
        visit(module, ())


def test_no_file_of_the_library_is_over_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): count
        for path in [*PACKAGE.rglob("*.py"), *(REPOSITORY / "tools").glob("*.py")]
        if (count := len(path.read_text("utf-8").splitlines())) > 400
    }
    assert not long
