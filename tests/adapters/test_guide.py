"""The guide to an adapter of one's own: its code blocks, run as they are written."""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.text import Text

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import REGISTRY

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "your_own_adapter.md").read_text(encoding="utf-8")
MODULE, USE, IMPORT, STUB, TEST = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
NAME = "hadamard_toolkit.adapters.output_scale"


def load(name: str, text: str, folder: Path) -> ModuleType:
    """The module `name` from a file with this text."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The library as it is after steps 1 and 2."""
    module = load(NAME, MODULE, tmp_path)
    monkeypatch.setattr(ht, "OutputScale", module.OutputScale, raising=False)
    yield module
    del REGISTRY["OutputScale"], sys.modules[NAME]


def test_the_adapter_attaches_is_saved_and_loaded(
    guided: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {"OutputScale": guided.OutputScale}
    exec(USE, names)
    assert "adapter        3" in capsys.readouterr().out
    assert Path(names["folder"], "adapter_config.json").is_file()
    assert hasattr(names["model"], "hadamard_attachment")


def test_the_registry_lines_name_the_module(guided: ModuleType) -> None:
    exec(IMPORT, {})
    source, _, names = STUB.removeprefix("from ").partition(" import ")
    assert f"hadamard_toolkit{source}" == NAME
    assert names.strip() == "OutputScale as OutputScale"
    assert getattr(guided, "OutputScale") is REGISTRY["OutputScale"]  # noqa: B009


def test_the_test_of_the_guide_passes(guided: ModuleType, tmp_path: Path) -> None:
    module = load("tests.adapters.test_output_scale", TEST, tmp_path)
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    for function in tests:
        marks = getattr(function, "pytestmark", [])
        for case in [(case,) for mark in marks for case in mark.args[1]] or [()]:
            function(*case)
    del sys.modules["tests.adapters.test_output_scale"]


def test_the_error_of_the_guide_is_the_real_one(guided: ModuleType) -> None:
    [said] = re.findall(r'`OutputScale\(start=0\)` says: "(.*?)"', GUIDE)
    with pytest.raises(ht.ArgumentError) as refused:
        guided.OutputScale(start=0)
    assert str(refused.value) == said


def test_what_the_guide_names_is_there() -> None:
    links = re.findall(r"\]\((\.\./[^)]+)\)", GUIDE)
    assert len(links) > 2
    for link in links:
        assert (REPOSITORY / "docs" / link).is_file(), link
    for path in re.findall(r"`((?:tests|docs|notebooks|hadamard_toolkit)/[\w/]+\.\w+)`", GUIDE):
        assert "output_scale" in path or (REPOSITORY / path).is_file(), path
    lines = (REPOSITORY / "hadamard_toolkit" / "adapters" / "ia3.py").read_text().count("\n")
    assert f"{lines} lines" in GUIDE


def test_a_drawing_says_what_it_computes(guided: ModuleType) -> None:
    texts = [text.get_text() for text in ht.plotting.sites(guided.OutputScale()).findobj(Text)]
    assert any("A′ = g · A" in text for text in texts)
