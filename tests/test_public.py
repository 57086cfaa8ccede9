"""The names that `import hadamard_toolkit as ht` promises."""

from __future__ import annotations

import ast
import subprocess
import sys
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
