"""The documentation says what trains in a bank, as the tests saw it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES
from tests.training.bank_support import ALONE, HEADER, bank_column

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "support.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index(HEADER) :] if HEADER in PAGE else ""
HOW = "run: python -m tests.adapters.support"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_documented_banks_are_the_real_ones(architecture: str) -> None:
    head, _, *rows = (line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("|"))
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", SECTION, re.MULTILINE))
    cells = {row[0]: row[head.index(architecture)] for row in rows}
    written = {method: None if cell == "✓" else reasons[cell.strip("[]")] for method, cell in cells.items()}
    assert bank_column(architecture) == written, HOW


@pytest.mark.parametrize("situation", ALONE)
def test_what_is_always_trained_alone_is_documented(situation: str) -> None:
    assert f"\n- {situation}: {ALONE[situation]()}\n" in SECTION, HOW
