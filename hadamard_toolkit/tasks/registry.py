"""Every task by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from hadamard_toolkit.errors import ArgumentError, suggestion
from hadamard_toolkit.paths import prepared_place
from hadamard_toolkit.tasks import domains, embedded, glue, squad
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.tasks.files import read_task

TASKS: dict[str, Callable[[str | Path | None], Task]] = {
    **{name: partial(glue.load, name) for name in glue.SOURCES},
    "squad": squad.load,
    "squad-unambiguous": partial(squad.load, unambiguous=True),
    **{name: partial(domains.load, name) for name in domains.SOURCES},
    **{f"embedded/{name}-polarity": partial(embedded.polarity, name) for name in embedded.DOMAINS},
    **{f"embedded/{name}-intensity": partial(embedded.intensity, name) for name in embedded.DOMAINS},
    "embedded/domain-identification": embedded.domain_identification,
    "embedded/word-order": embedded.word_order,
    "embedded/next-sentence": embedded.next_sentence,
}
_BUILT_IN = dict(TASKS)


def load_task(
    name: str, *, root: str | Path | None = None, limit: int | Mapping[str, int] | None = None, seed: int = 0
) -> Task:
    """A task by name: a GLUE task (`sst2`, also written `SST-2`), `squad`, a task of the four domains (`chemprot`, also
    written `domains/ChemProt`) or one of the `embedded/…` suite.

    `root` is a folder with local data, in the layouts of `glue.load`, `squad.load` and `domains.load` (which also say
    where else they are looked for); the embedded suite needs none and ignores it. `limit` keeps at most so many
    training rows, or so many rows of each split in a mapping, drawn by `seed`.

    Raises `ArgumentError` for an unknown name or a bad limit, `DataError` for data that are missing or do not fit,
    `DownloadError` where the embedded suite is out of reach.
    """
    name = canonical(name)
    prepared = prepared_place("tasks", name) if root is None else None
    task = TASKS[name](root) if prepared is None else read_task(prepared)
    return task.limited(limit, seed)


def canonical(name: str) -> str:
    """The registered spelling: case, `-`, `_` and a leading `glue/` or `domains/` do not matter."""
    squashed = {_squash(known): known for known in TASKS}
    if isinstance(name, str) and _squash(name) in squashed:
        return squashed[_squash(name)]
    raise ArgumentError(
        f"name={name!r} is no known task.{suggestion(name, TASKS)} Known tasks: {', '.join(TASKS)}"
    )


def is_built_in(name: str) -> bool:
    """Whether the task `name` has the loader of this library, not one that a user has put into `TASKS`."""
    return name in TASKS and TASKS[name] is _BUILT_IN.get(name)


def _squash(name: str) -> str:
    return re.sub(r"^(glue|domains)/|[-_\s]", "", name.lower())
