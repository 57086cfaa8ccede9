"""One registry line, one module, one test file, one row in the docs: what adding a method takes, and no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import REGISTRY, Adapter, adapter_from_dict, adapter_to_dict
from tests.adapters.support import NAMED, SWITCHED, defaults

TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "hadamard_toolkit"
# Modules of adapters/ that hold no method: what all methods share.
SHARED = {
    *("__init__", "base", "attachment", "files", "masking", "gates", "attention", "parts", "counting"),
    *("bases", "declaring", "wiring", "fields", "fingerprint", "loading", "merging", "passing"),
}
# Registered adapters whose module holds others too; every other module registers one.
TOGETHER = {
    "bottleneck": {"Houlsby", "Pfeiffer", "ParallelAdapter"},
    "tuning": {"HeadOnly", "LayerNormTuning", "FullFineTuning", "BitFit"},
}


def by_module() -> dict[str, set[str]]:
    """Module name -> the adapters that it registers."""
    found: dict[str, set[str]] = {}
    for name, adapter in REGISTRY.items():
        found.setdefault(adapter.__module__.rpartition(".")[2], set()).add(name)
    return found


def test_every_module_registers_its_method_and_every_line_is_counted() -> None:
    files = {path.stem for path in (PACKAGE / "adapters").glob("*.py")}
    assert set(by_module()) == files - SHARED
    lines = sum(
        len(re.findall(r"^@register$", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in (PACKAGE / "adapters").glob("*.py")
    )
    assert lines == len(REGISTRY)
    assert {module: names for module, names in by_module().items() if len(names) > 1} == TOGETHER


def test_every_method_has_a_test_file() -> None:
    tested = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert set(by_module()) <= tested


def test_every_method_has_one_row_in_the_docs() -> None:
    text = (TESTS.parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    of_methods, _, _ = text.partition("## In banks")
    rows = re.findall(r"^\| (`[^|]+`) \|", of_methods, re.MULTILINE)
    assert rows == [*(NAMED.get(name, f"`{name}`") for name in sorted(REGISTRY)), *SWITCHED]


def test_every_method_is_a_public_name() -> None:
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    for name, adapter in REGISTRY.items():
        assert f"{name} as {name}" in stub
        assert getattr(ht, name) is adapter
    functions = {name.strip("`").partition("(")[0] for name in SWITCHED} - set(REGISTRY)
    assert all(callable(getattr(ht, name)) for name in functions)


@pytest.mark.parametrize("adapter", [*defaults().values(), *SWITCHED.values()], ids=str)
def test_it_is_a_value_that_json_holds(adapter: Adapter) -> None:
    record = json.loads(json.dumps(adapter_to_dict(adapter)))
    assert adapter_from_dict(record) == adapter
    assert hash(adapter_from_dict(record)) == hash(adapter)
