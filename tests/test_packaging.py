"""pyproject.toml, constraints.txt and environment.yml say the same."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

CONDA_TO_PYPI = {"pytorch": "torch"}
VISIBLE = {
    *(
        "torch",
        "transformers",
        "datasets",
        "matplotlib",
        "seaborn",
        "typer",
        "ipywidgets",
        "jupytext",
        "nbval",
    )
}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def declared(project: dict[str, Any]) -> dict[str, SpecifierSet]:
    """Name to bound, over the core and every extra; a name declared twice must have one bound."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds: dict[str, SpecifierSet] = {}
    for line in (line for one in lists for line in one):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert bounds.setdefault(name, requirement.specifier) == requirement.specifier, (
            f"{name} has two bounds"
        )
    return bounds


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    found: dict[str, Version] = {}
    for line in (line for line in lines if line and not line.startswith("#")):
        name, separator, version = line.partition("==")
        assert separator, f"constraints.txt holds exact pins only, not {line!r}"
        assert canonicalize_name(name) not in found, f"{name} is pinned twice"
        found[canonicalize_name(name)] = Version(version)
    return found


@pytest.fixture(scope="module")
def conda(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "environment.yml").read_text())


def test_every_dependency_has_a_bound_and_a_pin_inside_it(
    declared: dict[str, SpecifierSet], pins: dict[str, Version]
) -> None:
    assert [name for name, bound in declared.items() if not bound] == []
    assert sorted(set(declared) - set(pins)) == []
    assert {name: str(pins[name]) for name, bound in declared.items() if pins[name] not in bound} == {}


def test_every_dependency_says_why_it_is_there(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    entries = re.findall(r'^    ("[A-Za-z][\w.-]*[<>=].*)$', text, flags=re.MULTILINE)
    assert len(entries) > 30
    assert [entry for entry in entries if not re.search(r'",\s+# \S', entry)] == []


def test_torch_is_pinned_without_a_build(pins: dict[str, Version]) -> None:
    assert pins["torch"].local is None


def test_conda_shows_the_visible_packages_with_the_bounds_of_pyproject(
    conda: dict[str, Any], declared: dict[str, SpecifierSet], project: dict[str, Any]
) -> None:
    rows = [Requirement(row) for row in conda["dependencies"] if isinstance(row, str)]
    bounds = {CONDA_TO_PYPI.get(row.name, row.name): row.specifier for row in rows}
    assert bounds.pop("python") == SpecifierSet(project["requires-python"])
    assert set(bounds) == VISIBLE | {"pip"}
    assert bounds == {name: declared[name] for name in bounds}


def test_conda_takes_conda_forge_only_and_the_rest_from_pyproject(conda: dict[str, Any]) -> None:
    assert [channel for channel in conda["channels"] if channel != "nodefaults"] == ["conda-forge"]
    assert [row["pip"] for row in conda["dependencies"] if isinstance(row, dict)] == [
        ["-e .[notebooks,test]"]
    ]


def test_the_design_s_floors(declared: dict[str, SpecifierSet], project: dict[str, Any]) -> None:
    assert project["requires-python"] == ">=3.11"
    assert "2.11" in declared["torch"]
    assert "2.10" not in declared["torch"]
    assert "5.17" in declared["transformers"]
    assert "5.16" not in declared["transformers"]


@pytest.mark.skipif(
    os.environ.get("TEST_RESOLUTION") != "lowest-direct", reason="only in the environment of make test-lowest"
)
def test_the_lower_bounds_are_what_the_lowest_environment_holds(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    named = [Requirement(line) for line in (*project["dependencies"], *extras["notebooks"], *extras["test"])]
    bounds = {one.name: bound.version for one in named for bound in one.specifier if bound.operator == ">="}
    wrong = {
        f"{name}>={bound}": metadata.version(name)
        for name, bound in bounds.items()
        if metadata.version(name) not in SpecifierSet(f"=={bound}.*")
    }
    assert wrong == {}, "nothing tests these bounds: another requirement asks for more"


def test_one_version_everywhere(repository: Path, project: dict[str, Any]) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert "Apache License" in (repository / "LICENSE").read_text()[:200]
