"""The names that `import hadamard_toolkit as ht` promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit import errors


def promised(repository: Path) -> dict[str, str]:
    """Public name to the module it comes from, as the stub says."""
    stub = ast.parse((repository / "hadamard_toolkit" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(stub.body)
    assert all(alias.asname == alias.name for node in imports for alias in node.names), "not exported to mypy"
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def test_the_stub_and_the_package_agree(repository: Path) -> None:
    names = promised(repository)
    assert set(ht.__all__) == set(names) <= set(dir(ht))
    for name, module in names.items():
        home = import_module(f"hadamard_toolkit.{module or name}")
        assert getattr(ht, name) is (getattr(home, name) if module else home)


@pytest.mark.parametrize("room", ["studies", "plotting"])
def test_no_module_takes_the_name_of_a_function(room: str, repository: Path) -> None:
    """A module that is loaded later would replace the public name in its room."""
    package = import_module(f"hadamard_toolkit.{room}")
    for path in (repository / "hadamard_toolkit" / room).glob("[a-z]*.py"):
        import_module(f"hadamard_toolkit.{room}.{path.stem}")
    assert [name for name in package.__all__ if isinstance(getattr(package, name), ModuleType)] == []


def test_every_error_is_public() -> None:
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert own <= set(ht.__all__)
    assert all(issubclass(getattr(ht, name), ht.ToolkitError) for name in own)
    with pytest.raises(ht.ArgumentError):
        ht.load_task("no such task")


def test_the_version_is_that_of_the_project(repository: Path) -> None:
    assert f'\nversion = "{ht.__version__}"\n' in (repository / "pyproject.toml").read_text()


def test_a_method_of_ones_own_needs_public_names_alone() -> None:
    for name in ("Adapter", "SiteModule", "register", "attach", "Attachment"):
        assert name in ht.__all__
    assert issubclass(ht.Hadamard, ht.Adapter)


def test_errors_and_version_do_not_wait_for_torch() -> None:
    code = (
        "import sys, hadamard_toolkit as ht; ht.__version__, ht.UnsupportedError, ht.ToolkitError; "
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def defaults(tree: ast.Module) -> Iterator[tuple[str, object]]:
    """Names and values of the constants that parameters and fields take where none is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            by_place = [*node.posonlyargs, *node.args]
            pairs = [*zip(reversed(by_place), reversed(node.defaults), strict=False)]
            for argument, value in (*pairs, *zip(node.kwonlyargs, node.kw_defaults, strict=True)):
                if isinstance(value, ast.Constant):
                    yield argument.arg, value.value
        elif isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant):
                    yield ast.unparse(field.target), field.value.value


def test_one_name_has_one_default_everywhere(repository: Path) -> None:
    """Who leaves out a seed, a level or a length has the same in every room."""
    found: dict[str, set[object]] = defaultdict(set)
    for path in (repository / "hadamard_toolkit").rglob("*.py"):
        for name, value in defaults(ast.parse(path.read_text(encoding="utf-8"))):
            if value is not None:
                found[name].add(value)
    agreed = {
        "seed": 0,
        "level": 0.95,
        "alpha": 0.05,
        "labels": 2,
        "max_length": 128,
        "strict": True,
    }
    assert {name: found[name] for name in agreed} == {name: {value} for name, value in agreed.items()}
