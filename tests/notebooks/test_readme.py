"""What the README says of the claims is what `figures/claims.md` says."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HEAD = "| claim | compared | points | verdict |"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def short_form(text: str) -> list[str]:
    """The rows that rest on two tasks or more, or on a count, in four columns, and how many are left out."""
    names, _, *rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    table = [dict(zip(names, row, strict=True)) for row in rows]
    shown = [row for row in table if row["power"] != "–" or row["difference"].endswith("%")]
    lines = [
        " | ".join(row[name] for name in ("claim", "compared", "difference", "verdict")) for row in shown
    ]
    return [
        HEAD,
        "| --- | --- | --- | --- |",
        *(f"| {line} |" for line in lines),
        "",
        f"{len(table) - len(shown)} further claims have runs on one task or none, so they cannot be told "
        "([whole table](figures/claims.md), with tests, scale and power).",
    ]


def test_the_readme_shows_the_claims_as_they_were_judged() -> None:
    expected = short_form((REPOSITORY / "figures" / "claims.md").read_text("utf-8"))
    readme = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    start = readme.index(HEAD)
    assert readme[start : start + len(expected)] == expected


def test_the_short_form_leaves_out_what_cannot_be_tested_and_counts_it() -> None:
    text = "| claim | compared | difference | power | verdict |\n|--|--|--|--|--|\n"
    text += "| a | A − B | +1.0 [0, 2] | 0.90 | holds here |\n| b | C − D | +9.0 | – | cannot be told |\n"
    lines = short_form(text + "| c | 1 of 3 | 0.3333 % | – | holds here |\n")
    assert lines[2:4] == [
        "| a | A − B | +1.0 [0, 2] | holds here |",
        "| c | 1 of 3 | 0.3333 % | holds here |",
    ]
    assert lines[5].startswith("1 further claims")
