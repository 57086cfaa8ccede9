"""`hadamard doctor`: what this installation has, and what would stop a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hadamard_toolkit.downloads import downloads_folder, file_sha256
from hadamard_toolkit.paths import cache_folder
from hadamard_toolkit.pinned import PINNED
from hadamard_toolkit.runs import environment

EMBEDDED = "embedded"
HUB_FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False for what stops runs, None for what is only missing."""

    topic: str
    text: str
    ok: bool | None = True


def examine() -> list[Finding]:
    """Every finding, in the order of the report."""
    parts = (_packages(), _device(), _cache(), _backbones(), _data(), _hub())
    return [finding for part in parts for finding in part]


def _packages() -> Iterator[Finding]:
    for name, version in environment.versions().items():
        if version == "missing":
            yield Finding(name, "missing; install the toolkit again", ok=False)
        else:
            yield Finding(name, version)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "check")
    for line in subprocess.run(pip, capture_output=True, text=True, check=False).stdout.splitlines():
        if re.match("hadamard[-_]toolkit ", line):  # what other packages lack is not ours to say
            yield Finding("requirements", line, ok=False)


def _device() -> Iterator[Finding]:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment.describe_device(torch.device(where))
    more = f"; {torch.cuda.device_count()} GPUs" if where == "cuda" else ""
    yield Finding("device", f"{where} ({about['device_name']}){more}")
    yield Finding("threads", f"{about['threads']} of {environment.usable_cores()} usable cores")


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:  # to write, and not to ask: permission bits know nothing of disks mounted to be read, nor of files in the way
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror or error})"
        yield Finding("cache", f"{reason}; set HADAMARD_CACHE to a folder that can", ok=False)
    else:
        free = shutil.disk_usage(existing).free / 2**30
        yield Finding("cache", f"{folder} ({free:.1f} GiB free)")


def _backbones() -> Iterator[Finding]:
    for name in PINNED:
        yield _pinned(name, pinned_files(name))


def _data() -> Iterator[Finding]:
    from hadamard_toolkit.tasks.glue import SOURCES
    from hadamard_toolkit.tasks.places import local_roots

    yield _pinned(EMBEDDED, pinned_files(EMBEDDED))
    for root in local_roots(None):
        found = [name for name, source in SOURCES.items() if (root / "glue" / source.folder).is_dir()]
        if found:
            yield Finding("glue", f"{', '.join(found)} in {root}")
        else:
            yield Finding(
                "glue", f"no local files in {root}; set HADAMARD_DATA, or the hub is asked", ok=None
            )


def _pinned(name: str, files: dict[Path, str]) -> Finding:
    if wrong := damaged(name):
        return Finding(
            name, f"{', '.join(map(str, wrong))} is damaged; `hadamard fetch {name}` mends it", ok=False
        )
    if all(path.is_file() for path in files):
        return Finding(name, "present, SHA-256 as pinned")
    return Finding(name, f"not fetched yet; `hadamard fetch {name}` does it", ok=None)


def pinned_files(name: str) -> dict[Path, str]:
    """Where the files of a pinned backbone, or of the embedded data, lie once fetched, each with its SHA-256."""
    if name == EMBEDDED:
        from hadamard_toolkit.tasks.vader import DISTRIBUTION

        return {downloads_folder() / DISTRIBUTION.filename: DISTRIBUTION.sha256}
    folder = cache_folder() / "backbones" / name
    return {folder / file: digest for file, digest in PINNED[name].files.items()}


def damaged(name: str) -> list[Path]:
    """Those of `pinned_files` that are there and are not what was pinned; every byte is read."""
    return [
        path for path, digest in pinned_files(name).items() if path.is_file() and file_sha256(path) != digest
    ]


def _hub() -> Iterator[Finding]:
    flags = [flag for flag in HUB_FLAGS if re.fullmatch("1|on|yes|true", os.environ.get(flag, "").lower())]
    if flags:
        yield Finding("hub", f"offline ({', '.join(flags)}): hub ids work from the hub's local cache only")
    else:
        yield Finding("hub", "allowed (HF_HUB_OFFLINE=1 forbids it)")
