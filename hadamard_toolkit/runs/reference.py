"""The store that a study reads: the committed reference runs, or a store of the user's own."""

from __future__ import annotations

import os

from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.paths import CHECKOUT, in_checkout
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.store import RunStore

REFERENCE = CHECKOUT / "data" / "reference_runs"


def reference(*plans: str, own: bool = True) -> RunStore:
    """The committed runs of these plans (`"spine"` is `data/reference_runs/spine.toml`); without a plan, all of them.

        ht.reference("spine", "layers").load()

    Where `$HADAMARD_STORE` names a folder, it is that store with all its runs, so that a study reads the user's own
    runs; with `own=False` the variable is not looked at. Raises `ArgumentError` for a plan that is not there, and
    outside a checkout of the repository, of which the runs are part.
    """
    if own and (folder := os.environ.get("HADAMARD_STORE")):
        return RunStore(folder)
    if not in_checkout():
        raise ArgumentError(
            "the reference runs are part of a checkout of the repository, and this is an installed package; "
            "set HADAMARD_STORE to a folder of your own runs"
        )
    store = RunStore(REFERENCE)
    if not plans:
        return store
    known = sorted(path.stem for path in REFERENCE.glob("*.toml"))
    for plan in plans:
        check_choice("plan", plan, known)
    return store.only([spec for plan in plans for spec in load_plan(REFERENCE / f"{plan}.toml")])
