"""The folder of an attachment is written wholly or not at all, and read wholly or not at all."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, StoreError
from tests.adapters.life import logits, shake
from tests.architectures import tiny_model
from tests.permissions import read_only

NOT_SAVED = r"^folder='.*cannot be written to: File too large; the attachment is not saved"


def trained(seed: int = 1, adapter: Any = None) -> ht.Attachment:
    attachment = ht.attach(tiny_model("bert"), adapter or ht.LoRA(rank=4))
    shake(attachment, seed=seed)
    return attachment


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Writing more than `room` bytes to a file fails in the block, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("masked", [False, True])
def test_a_full_disk_leaves_the_older_files(masked: bool, tmp_path: Path) -> None:
    older = trained()
    older.save(tmp_path / "saved")
    (tmp_path / "saved" / "note.txt").write_text("mine")
    before = content(tmp_path / "saved")
    newer = trained(seed=2, adapter=ht.LoRA(rank=8, init="normal"))
    if masked:
        ht.sparsify(newer, scorer="random", sparsity=0.5)
    with full_disk(2_000), pytest.raises(StoreError, match=NOT_SAVED):  # the config fits, the weights do not
        newer.save(tmp_path / "saved")
    assert content(tmp_path / "saved") == before
    assert torch.equal(
        logits(ht.load_attachment(tiny_model("bert"), tmp_path / "saved").model), logits(older.model)
    )


def test_a_full_disk_leaves_no_new_folder(tmp_path: Path) -> None:
    with full_disk(2_000), pytest.raises(StoreError, match=NOT_SAVED):
        trained().save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "mine" / "deeper"):
        with read_only(tmp_path / "mine"), pytest.raises(StoreError, match=r"^folder='.*Permission denied"):
            trained().save(folder)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_without_a_name_is_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attachment = trained()
    with pytest.raises(ArgumentError, match="folder='' is not allowed: it would be the working folder"):
        attachment.save("")
    assert list(tmp_path.iterdir()) == []
    attachment.save(".")
    assert set(content(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}


def _swap(folder: Path, name: str) -> None:
    other = trained(seed=2)
    other.save(folder.parent / "other")
    (folder / name).write_bytes((folder.parent / "other" / name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "incomplete: adapter_model.safetensors is missing",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "is damaged, or from another save"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-100]
            ),
            "is damaged, or from another save",
        ),
        (lambda f: _swap(f, "adapter_model.safetensors"), "is damaged, or from another save"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not that of an attachment"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"format": 2, "adapter": {}}'),
            "has no 'backbone'",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text('{"format": 3}'),
            "holds format 3; .* reads formats 1 to 2",
        ),
    ],
)
def test_damage_is_one_clear_error(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    trained().save(tmp_path / "saved")
    damage(tmp_path / "saved")
    model = tiny_model("bert")
    with pytest.raises(DataError, match=message):
        ht.load_attachment(model, tmp_path / "saved")
    assert not hasattr(model, "hadamard_attachment")


def test_damage_in_files_without_digests(tmp_path: Path) -> None:
    trained().save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    del config["files"]
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps({**config, "format": 1}))
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"adapter_model.safetensors in folder=.* cannot be read"):
        ht.load_attachment(tiny_model("bert"), tmp_path / "saved", strict=False)


def test_masks_of_an_earlier_save_are_gone(tmp_path: Path) -> None:
    sparse = trained(adapter=ht.LoRA(rank=4, init="normal"))
    ht.sparsify(sparse, scorer="random", sparsity=0.5)
    sparse.save(tmp_path)
    assert (tmp_path / "masks.json").is_file()
    trained().save(tmp_path)
    assert set(content(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_attachment_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        trained().save(tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    attachment = trained()
    attachment.save("~/adapters/one")
    assert (tmp_path / "adapters" / "one" / "adapter_config.json").is_file()
    assert torch.equal(
        logits(ht.load_attachment(tiny_model("bert"), "~/adapters/one").model), logits(attachment.model)
    )


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="there is a file of that name"):
        trained().save(tmp_path / "file")
    with pytest.raises(ArgumentError, match="holds no saved attachment"):
        ht.load_attachment(tiny_model("bert"), tmp_path / "file")
