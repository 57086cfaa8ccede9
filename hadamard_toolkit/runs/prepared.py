"""A folder with all that a plan needs, for a machine without a network: written on one machine, used on another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from hadamard_toolkit.downloads import file_sha256
from hadamard_toolkit.errors import ArgumentError, DataError, StoreError, ToolkitError
from hadamard_toolkit.paths import PREPARED, atomic_folder, place_in
from hadamard_toolkit.runs.fusion_sources import source_specs
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.spec import RunSpec

PLAN, MANIFEST = "plan.toml", "manifest.json"
OF_A_BACKBONE = (
    ".json",
    ".safetensors",
    ".txt",
    ".model",
    ".jinja",
)  # endings of files that a backbone is read from


def prepare(plan: str | Path, folder: str | Path) -> pd.DataFrame:
    """Gather what the runs of a plan file need in `folder`: backbones, rows, bases of subspaces, and the plan itself.

    What is not on this machine yet is fetched. Copied to another machine, the folder is all that
    `hadamard sweep FOLDER/plan.toml` reads there: it gives the same runs under the same keys. A folder that was
    prepared before is replaced.

    Returns a row per file: `file`, `bytes`, `sha256`, as the manifest lists them. Raises `ArgumentError` for a bad
    plan, for a backbone in a folder whose path is not written in full, and where `folder` holds something else;
    `StoreError` where it cannot be written to; what loading a backbone or a task raises.
    """
    specs, target = load_plan(plan), Path(folder).expanduser()
    for spec in specs:
        if (given := spec.as_given().backbone) != spec.backbone:
            raise ArgumentError(
                f"backbone={given!r} is not allowed in a plan for another machine: the keys of its runs hold the whole "
                f"path, so write {spec.backbone!r}"
            )
    if target.exists() and not (target / MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise ArgumentError(f"folder={str(folder)!r} holds something else; name a new one, or an empty one")
    try:
        with atomic_folder(target) as staging:
            shutil.copyfile(Path(plan).expanduser(), staging / PLAN)
            _gather(specs, staging)
            files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
            manifest = {
                path.relative_to(staging).as_posix(): [path.stat().st_size, file_sha256(path)]
                for path in files
            }
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    except ToolkitError:  # some are an OSError too
        raise
    except OSError as error:
        raise StoreError(f"folder={str(folder)!r} cannot be written to: {error.strerror or error}") from error
    return pd.DataFrame(
        [(file, *facts) for file, facts in manifest.items()], columns=["file", "bytes", "sha256"]
    )


def _gather(specs: Iterable[RunSpec], folder: Path) -> None:
    from hadamard_toolkit.adapters.bases import load_basis, path_of_basis
    from hadamard_toolkit.adapters.subspace import Subspace
    from hadamard_toolkit.backbones import backbone_folder, is_hub_id, load_backbone
    from hadamard_toolkit.tasks.files import write_task
    from hadamard_toolkit.tasks.registry import load_task

    for name in dict.fromkeys(spec.backbone for spec in specs):
        if is_hub_id(name):
            load_backbone(name)  # into the hub's cache
        source = backbone_folder(name)
        target = place_in(folder, "backbones", name) / (source.name if is_hub_id(name) else "files")
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file() and path.suffix in OF_A_BACKBONE:
                shutil.copyfile(path, target / path.name)
    parts = [part for spec in specs for part in (spec.adapter, *getattr(spec.adapter, "adapters", ()))]
    for name in dict.fromkeys(part.basis for part in parts if isinstance(part, Subspace)):
        load_basis(name)  # whole, or an error
        target = place_in(folder, "bases", name)
        target.mkdir(parents=True)
        shutil.copyfile(path_of_basis(name), target / path_of_basis(name).name)
    for name in dict.fromkeys(name for spec in specs for name in _tasks_of(spec)):
        write_task(load_task(name), place_in(folder, "tasks", name))


def _tasks_of(spec: RunSpec) -> list[str]:
    """The tasks whose rows a run reads: its own, those of a fusion's adapters, and those of continued pretraining."""
    from hadamard_toolkit.training.continued_pretraining import tasks_of
    from hadamard_toolkit.training.pretraining_step import TASK

    texts = [step.text for step in spec.protocol.pretraining if step.text != TASK]
    sources = [source.task for source in source_specs(spec).values()]
    return [spec.task, *sources, *(name for text in texts for name in tasks_of(text))]


def use_prepared(plan: str | Path) -> bool:
    """Whether `plan` lies in a prepared folder; then this process, and those that it starts, read from that folder.

    Every file is compared with the manifest first. `DataError` names the first that is missing or damaged.
    """
    folder = Path(plan).expanduser().resolve().parent
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        wrong = [
            (file, "missing" if not (folder / file).is_file() else "damaged")
            for file, (size, digest) in manifest.items()
            if not _is_whole(folder / file, size, digest)
        ]
        manifest[PLAN]
    except (ValueError, AttributeError, TypeError, KeyError):
        wrong, manifest = [(MANIFEST, "damaged")], [MANIFEST]
    if wrong:
        file, state = wrong[0]
        raise DataError(
            f"{folder} is not as it was prepared: {file} is {state} ({len(wrong)} of {len(manifest)} files are missing "
            "or damaged); copy the folder again"
        )
    os.environ[PREPARED] = str(folder)
    return True


def _is_whole(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and file_sha256(path) == digest
