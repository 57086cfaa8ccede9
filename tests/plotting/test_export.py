"""What is written: the same bytes every time, fonts a venue accepts, provenance, and no smoke over results."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pypdf import PdfReader

from hadamard_toolkit import paths
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.plotting import WIDTHS, export, publish, save, score_by_method, table_hash
from hadamard_toolkit.plotting.export import rounded

TABLE = pd.DataFrame(
    {
        "task": ["sst2"] * 4,
        "method": ["Hadamard", "Hadamard", "Head only", "Head only"],
        "seed": [0, 1, 0, 1],
        "score": [0.9, 0.91, 0.8, 0.82],
    }
)


def saved(folder: Path, profile: str = "paper", name: str = "scores") -> export.Saved:
    return save(score_by_method(TABLE), name, table=TABLE, folder=folder, profile=profile)


@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_the_same_table_gives_the_same_bytes(tmp_path: Path, profile: str) -> None:
    first, second = saved(tmp_path / "a", profile), saved(tmp_path / "b", profile)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix


def test_the_last_digits_of_a_sum_change_no_byte(tmp_path: Path) -> None:
    """Another processor adds up in another order."""
    generator = np.random.default_rng(0)
    exact = pd.concat([TABLE.assign(task=f"task {place}") for place in range(4)], ignore_index=True)
    exact = exact.assign(score=generator.uniform(0.3, 0.9, len(exact)))
    other = exact.assign(score=exact["score"] * (1 + generator.choice([-1, 1], len(exact)) * 1e-13))
    assert table_hash(exact) != table_hash(other)
    sets = [
        save(score_by_method(table), "scores", table=table, folder=tmp_path / name, profile="paper")
        for name, table in (("a", exact), ("b", other))
    ]
    for one, two in zip(*sets, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.suffix
    record = json.loads(sets[0].json.read_text())["table"]
    assert record["sha256"] == table_hash(rounded(exact))
    assert record["records"][0]["score"] == pytest.approx(exact["score"][0], rel=1e-9)


def test_tables_are_rounded_at_nine_significant_digits() -> None:
    table = pd.DataFrame(
        {
            "small": np.array([1.23456789012e-8, np.nan], np.float32),
            "large": [123456789012.0, -0.0123456789012],
            "count": [1234567890123, 2],
            "name": ["a", "b"],
        },
        index=[4, 7],
    )
    found = rounded(table)
    assert found["large"].tolist() == [123456789000.0, -0.0123456789]
    assert found["small"].tolist() == pytest.approx([1.23456789e-8, np.nan], nan_ok=True, rel=1e-7)
    assert found["count"].equals(table["count"])
    assert found["name"].equals(table["name"])
    assert found.index.equals(table.index)
    assert table["large"][4] == 123456789012.0, "the table itself stays"
    pd.testing.assert_frame_equal(rounded(found), found)


def test_saving_one_figure_twice_changes_neither_file_nor_figure(tmp_path: Path) -> None:
    figure = score_by_method(TABLE)
    size, artists = tuple(figure.get_size_inches()), len(figure.get_children())
    first = save(figure, "scores", table=TABLE, folder=tmp_path, profile="smoke")
    before = [path.read_bytes() for path in first]
    second = save(figure, "scores", table=TABLE, folder=tmp_path, profile="smoke")
    assert [path.read_bytes() for path in second] == before
    assert (tuple(figure.get_size_inches()), len(figure.get_children())) == (size, artists)


def test_fonts_are_embedded_truetype(tmp_path: Path) -> None:
    page = PdfReader(saved(tmp_path).pdf).pages[0]
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]  # type: ignore[index]
    assert fonts
    for font in fonts:
        assert font["/Subtype"] == "/Type0"  # a composite font, not /Type3
        inner = font["/DescendantFonts"][0].get_object()
        assert inner["/Subtype"] == "/CIDFontType2"
        assert "/FontFile2" in inner["/FontDescriptor"].get_object()


def test_provenance_is_in_all_three_files_and_free_of_dates_and_paths(tmp_path: Path) -> None:
    files = save(
        score_by_method(TABLE),
        "scores",
        table=TABLE,
        folder=tmp_path,
        profile="paper",
        caption="Scores",
        notes={"seeds": [0, 1]},
    )
    record = json.loads(files.json.read_text())
    assert record["table"]["sha256"] == table_hash(TABLE)
    assert record["table"]["rows"] == 4
    assert list(record["table"]["columns"]) == ["task", "method", "seed", "score"]
    assert record["table"]["records"] == TABLE.to_dict("records")
    assert (record["profile"], record["caption"], record["notes"]) == ("paper", "Scores", {"seeds": [0, 1]})
    assert set(record["versions"]) == {"hadamard_toolkit", "matplotlib"}

    inside = PdfReader(files.pdf).metadata
    assert inside is not None
    assert table_hash(TABLE) in inside["/Keywords"]
    assert "profile=paper" in inside["/Keywords"]
    assert "/CreationDate" not in inside
    with Image.open(files.png) as image:
        assert table_hash(TABLE) in image.info["Comment"]
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_large_table_is_named_by_its_hash_only(tmp_path: Path) -> None:
    large = pd.concat([TABLE.assign(seed=TABLE["seed"] + 2 * k) for k in range(60)])
    files = save(score_by_method(large), "scores", table=large, folder=tmp_path, profile="paper")
    record = json.loads(files.json.read_text())["table"]
    assert "records" not in record
    assert record["rows"] == 240


def test_the_hash_sees_values_columns_and_order_but_not_the_index() -> None:
    assert table_hash(TABLE) == table_hash(TABLE.set_axis([9, 8, 7, 6]))
    assert table_hash(TABLE) == hashlib.sha256(TABLE.to_csv(index=False).encode()).hexdigest()
    changed = (TABLE.assign(score=TABLE["score"] + 1e-15), TABLE.rename(columns={"score": "f1"}), TABLE[::-1])
    assert len({table_hash(other) for other in (TABLE, *changed)}) == 4


def test_smoke_is_marked_above_the_figure_which_stays_as_wide(tmp_path: Path) -> None:
    smoke, paper = saved(tmp_path, "smoke", "a"), saved(tmp_path, "paper", "b")
    assert "smoke run" in PdfReader(smoke.pdf).pages[0].extract_text()
    assert "smoke run" not in PdfReader(paper.pdf).pages[0].extract_text()
    marked, plain = (Image.open(io.BytesIO(files.png.read_bytes())) for files in (smoke, paper))
    assert marked.width == plain.width == round(WIDTHS["neurips"] * 300)
    strip = marked.height - plain.height
    assert strip == pytest.approx(export.STRIP * 300, abs=2)
    beneath = marked.crop((0, strip, marked.width, marked.height)).convert("RGB")
    assert beneath.tobytes() == plain.convert("RGB").tobytes()


def test_smoke_never_replaces_a_result_but_a_result_replaces_smoke(tmp_path: Path) -> None:
    saved(tmp_path, "smoke")
    kept = saved(tmp_path, "paper")
    before = [path.read_bytes() for path in kept]
    with pytest.raises(ArgumentError, match=r"'scores' of profile 'paper'.*smoke"):
        saved(tmp_path, "smoke")
    assert [path.read_bytes() for path in kept] == before
    assert not list(tmp_path.glob(".*"))


def test_the_profile_comes_from_the_environment_and_is_smoke_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_PROFILE", "paper")
    assert (
        json.loads(save(Figure(), "a", table=TABLE, folder=tmp_path).json.read_text())["profile"] == "paper"
    )
    monkeypatch.delenv("HADAMARD_PROFILE")
    assert (
        json.loads(save(Figure(), "b", table=TABLE, folder=tmp_path).json.read_text())["profile"] == "smoke"
    )


def test_a_published_figure_is_saved_and_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_PROFILE", "smoke")
    figure = score_by_method(TABLE)
    known = {"table": TABLE, "caption": "Scores", "folder": tmp_path}
    assert publish(figure, "scores", **known, notes={"seeds": 2}) is figure
    record = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert (record["profile"], record["caption"], record["notes"]) == ("reference", "Scores", {"seeds": 2})
    assert {path.suffix for path in tmp_path.iterdir()} == {".pdf", ".png", ".json"}
    publish(figure, "trial", **known, profile=None)
    assert json.loads((tmp_path / "trial.json").read_text("utf-8"))["profile"] == "smoke"


@pytest.mark.parametrize(("profile", "where"), [("paper", "figures"), ("smoke", "build/figures")])
def test_a_relative_folder_starts_at_the_checkout_or_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, where: str
) -> None:
    inside, outside = tmp_path / "checkout" / "notebooks", tmp_path / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
    monkeypatch.setattr(export, "CHECKOUT", tmp_path / "checkout")
    assert paths.in_checkout()
    monkeypatch.chdir(inside)
    assert save(Figure(), "a", table=TABLE, profile=profile).pdf == tmp_path / "checkout" / where / "a.pdf"
    monkeypatch.chdir(outside)
    assert save(Figure(), "a", table=TABLE, profile=profile).pdf == outside / where / "a.pdf"


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "two words"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="name="):
        save(Figure(), name, table=TABLE, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_drawn_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stream: io.BytesIO, **_: object) -> None:
        stream.write(b"half")
        raise RuntimeError("no ink")

    figure = score_by_method(TABLE)
    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(RuntimeError, match="no ink"):
        save(figure, "scores", table=TABLE, folder=tmp_path)
    assert not list(tmp_path.iterdir())
