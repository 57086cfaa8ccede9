"""The documentation says what the tests saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.support import ELSEWHERE, support_table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "support.md"


def test_the_documented_support_is_the_real_one() -> None:
    written = DOCS.read_text(encoding="utf-8").partition("\n## In banks")[0]
    assert support_table() == written, "run: python -m tests.adapters.support"


@pytest.mark.parametrize("situation", ELSEWHERE)
def test_what_the_table_does_not_show_is_refused_by_name(situation: str) -> None:
    with pytest.raises(UnsupportedError):
        ELSEWHERE[situation]()
