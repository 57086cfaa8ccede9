"""Tables for a paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import save_table

TABLE = pd.DataFrame(
    {"SST-2": ["81.6 ± 0.9 (3)", "67.9 ± 0.9 (3)"], "MRPC": ["not run", None]},
    index=pd.Index(["Hadamard", "(IA)³"], name="method"),
)


def test_a_table_becomes_latex_and_markdown(tmp_path: Path) -> None:
    saved = save_table(
        TABLE, "scores_glue", caption="Scores, 50 % & more", folder=tmp_path, profile="reference"
    )
    tex, md = saved.tex.read_text(), saved.md.read_text()
    assert r"81.6 $\pm$ 0.9 (3)" in tex
    assert r"(IA)$^3$" in tex
    assert r"\toprule" in tex
    assert r"\caption{Scores, 50 \% \& more}" in tex
    assert r"\label{tab:scores-glue}" in tex
    assert "±" not in tex, "ASCII, so that any engine sets it"
    assert [line.split("|")[1].strip() for line in md.splitlines()[:4]] == [
        "method",
        md.splitlines()[1].split("|")[1].strip(),
        "Hadamard",
        "(IA)³",
    ]
    assert "81.6 ± 0.9 (3)" in md
    assert "nan" not in (tex + md).lower()
    again = save_table(
        TABLE, "scores_glue", caption="Scores, 50 % & more", folder=tmp_path, profile="reference"
    )
    assert again.tex.read_text() == tex


def test_a_caption_is_taken_literally(tmp_path: Path) -> None:
    caption = r"a^b ~c \d {e} f_g $h$ #1 ±"
    table = TABLE.rename(columns={"MRPC": r"x^2 $y$ ~z \w"})
    tex = save_table(table, "scores", caption=caption, folder=tmp_path, profile="reference").tex.read_text()
    plain = r"a\textasciicircum{}b \textasciitilde{}c \textbackslash{}d \{e\} f\_g \$h\$ \#1 $\pm$"
    assert rf"\caption{{{plain}}}" in tex
    assert "^2 $" not in tex  # nor do the heads of columns mean anything


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = save_table(TABLE, "scores", caption="", folder="~/paper", profile="reference")
    assert saved.md == tmp_path / "paper" / "scores.md"
    assert saved.md.is_file()


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="name='a/b'"):
        save_table(TABLE, "a/b", caption="", folder=tmp_path)
    with pytest.raises(ArgumentError, match="'scores' is empty"):
        save_table(TABLE.iloc[:0], "scores", caption="", folder=tmp_path)


def test_a_smoke_table_goes_under_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HADAMARD_PROFILE", "smoke")
    assert save_table(TABLE, "scores", caption="").tex.parent.parts[-2:] == ("build", "figures")
    monkeypatch.setenv("HADAMARD_FIGURES", str(tmp_path / "mine"))
    assert save_table(TABLE, "scores", caption="").md == tmp_path / "mine" / "scores.md"
