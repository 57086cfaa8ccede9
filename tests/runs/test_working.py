from __future__ import annotations

from pathlib import Path

import pytest

from hadamard_toolkit.runs import working as module
from hadamard_toolkit.runs.working import working_store


def test_the_paper_profile_has_a_store_that_lasts(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HADAMARD_STORE", raising=False)
    assert working_store("paper").folder == repository / "runs" / "paper"
    assert "/runs/" in (repository / ".gitignore").read_text().splitlines()
    monkeypatch.setattr(module, "in_checkout", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert working_store("paper").folder == tmp_path / "runs" / "paper"


def test_other_profiles_begin_anew_and_a_store_of_ones_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HADAMARD_STORE", raising=False)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    first, second = working_store("smoke").folder, working_store("smoke").folder
    assert first != second
    assert {first.parent, second.parent} == {tmp_path}
    monkeypatch.setenv("HADAMARD_STORE", "~/mine")
    for profile in ("smoke", "paper"):
        assert working_store(profile).folder == Path.home() / "mine"
