"""Turns the arguments of `LayerPruner` into evaluations, and a pruning state into code that gives the same scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import ArgumentError, ToolkitError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.training import protocols
from hadamard_toolkit.widgets.evaluation import Evaluation
from hadamard_toolkit.widgets.pruned_adapter import adapter_source, pruned_adapter
from hadamard_toolkit.widgets.pruning_state import PruningState


def subjects(
    argument: Any, task: Task | str | None, tokenizer: Any, spec: RunSpec | None, **options: Any
) -> tuple[list[Evaluation], list[RunSpec | None], list[Path | None]]:
    """Evaluations, specs and stores (None for an attachment) of the first argument of `LayerPruner`."""
    if isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], Attachment):
        model, attachment = argument
        if attachment.model is not model:
            raise ArgumentError(
                "model_or_run=(model, attachment) is not allowed: that attachment is on another model"
            )
        argument = attachment
    if isinstance(argument, Attachment):
        if task is None or tokenizer is None:
            raise ArgumentError(
                "task and tokenizer are needed beside an attachment; a stored run knows its own"
            )
        if isinstance(task, str):
            from hadamard_toolkit.tasks.registry import load_task

            task = load_task(task)
        return [Evaluation(argument, task, tokenizer, **options)], [spec], [None]
    runs = (
        [argument] if isinstance(argument, Run) else list(argument) if isinstance(argument, Sequence) else []
    )
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise ArgumentError(
            f"model_or_run={argument!r} is not allowed; give a Run, several, an Attachment, or (model, attachment)"
        )
    if task is not None or tokenizer is not None or spec is not None:
        raise ArgumentError("task, tokenizer and spec belong to an attachment; a stored run knows its own")
    repeated = len({run.spec.task for run in runs}) < len(runs)
    evaluations = []
    for run in runs:
        name = f"{run.spec.task} ({run.key[:6]})" if repeated else run.spec.task
        if run.folder is None and run.attachment is not None:
            raise ArgumentError(
                "this run was not stored; give its attachment, or run(spec, store) and store.run(key)"
            )
        evaluations.append(Evaluation.of_run(run, name=name, **options))
    return evaluations, [run.spec for run in runs], [run.store for run in runs]


def profile_of(specs: Sequence[RunSpec | None]) -> str | None:
    """The profile of a figure of these runs: `smoke` if one of them saw no more rows than a smoke run, else `runs`.

    None, which leaves it to `plotting.save`, if `$HADAMARD_PROFILE` is set or the training of an attachment is unknown.
    """
    if os.environ.get("HADAMARD_PROFILE") or None in specs:
        return None
    rows = [spec.protocol.train_rows for spec in specs if spec is not None]
    few = protocols.smoke().train_rows or 0
    return "smoke" if any(count is not None and count <= few for count in rows) else "runs"


def headless_code(
    state: PruningState,
    evaluations: Sequence[Evaluation],
    specs: Sequence[RunSpec | None],
    sources: Sequence[Path | None],
    rows: int,
    store: RunStore,
) -> str:
    """Python that prints the scores of `state` from stored runs, and the call that would retrain it, as a comment."""
    before, after = ["from hadamard_toolkit.widgets.evaluation import Evaluation"], []
    for index, (evaluation, spec, source) in enumerate(
        zip(evaluations, specs, sources, strict=True), start=1
    ):
        mark = "" if len(evaluations) == 1 else f"_{index}"
        chosen = f"rows={rows}, split={evaluation.split!r}"
        if source is not None and spec is not None:
            before += ["", f"run{mark} = ht.RunStore({str(source)!r}).run({spec.key!r})"]
            before += [f"evaluation{mark} = Evaluation.of_run(run{mark}, {chosen})  # {spec.task}"]
        else:
            before += ["", "# with your own attachment, task and tokenizer"]
            before += [f"evaluation{mark} = Evaluation(attachment, task, tokenizer, {chosen})"]
        after.append(f"print(evaluation{mark}.score(kept))")
        if spec is not None:
            after += [
                "",
                "# trained anew, with what is kept alone",
                *(f"# {line}" for line in _retraining(state, spec, mark, store)),
            ]
    return state.as_code(before="\n".join(before), after="\n".join(after))


def _retraining(state: PruningState, spec: RunSpec, mark: str, store: RunStore) -> list[str]:
    try:
        adapter = adapter_source(pruned_adapter(spec.adapter, state))
    except ToolkitError as error:
        return [str(error)]
    call = f"ht.run(dataclasses.replace(run{mark}.spec, adapter={adapter}), {str(store.folder)!r})"
    return ["import dataclasses", call]
