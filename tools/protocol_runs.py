"""Train plans of PROTOCOL.md: `python tools/protocol_runs.py fair removal --store data/reference_runs`.

Decides step by step from what the store holds, trains what is missing, and writes the plan file of all that is there
into the store. It goes on where it was stopped; `--plan-only` trains nothing. With `--workers` and `--bank` runs that
fit together train in one pass, in several processes of one machine, on its GPU where it has one; what the plans
named first need goes first, and nothing new starts after `--minutes`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
import traceback
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from protocol_plans import DOMAINS, Cell, Fair, Few, Plan, Pruned, Removal, Subspace, Wanted, Wide

import hadamard_toolkit as ht
from hadamard_toolkit.runs.bank import Bank, banks
from hadamard_toolkit.runs.engines import Attempt, attempt
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.runs.plan import plan_text

LONG = {
    *DOMAINS,
    "mnli",
    "mrpc",
    "qnli",
    "rte",
}  # tasks of long texts: rows are padded to the longest of a bank
SHARE_FULL, SHARE_LONG = 0.25, 0.5  # of the bank's size, for full fine-tuning and for long texts


GRACE = 45  # seconds that banks in hand get when time is up
NAMES = ("fair", "wide", "subspace", "removal", "pruned", "few")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plans", nargs="+", choices=NAMES)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bank", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    store = ht.RunStore(options.store, keep="nothing")
    fair = Fair(store, "fair", "MiniLM on 300 rows of six tasks, eight methods")
    wide = Wide(
        store, "wide", "MiniLM on 500 rows of 24 tasks: the vectors that notebook 11 makes directions of"
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as executor:
        plans: dict[str, Plan] = {
            "fair": fair,
            "wide": wide,
            "subspace": Subspace(store, "subspace", "k coefficients on directions of others", wide, executor),
            "removal": Removal(store, "removal", "The Hadamard adapter retrained on every four of six layers", fair),
            "pruned": Pruned(store, "pruned", "LoRA with 80 % removed at initialisation, and its controls"),
            "few": Few(store, "few", "UniPELT's family on 100 and 500 rows of four GLUE tasks"),
        }  # fmt: skip
        names = [
            *options.plans,
            *({"subspace": "wide", "removal": "fair"}.get(name) for name in options.plans),
        ]
        chosen = [plans[name] for name in dict.fromkeys(names) if name]
        try:
            Runner(options.workers, options.bank, until).go(chosen, executor, train=not options.plan_only)
        finally:
            for plan in chosen:
                there = [spec for spec in plan.asked if spec in store]
                heading = f"{plan.comment}, by PROTOCOL.md\nWritten by tools/protocol_runs.py, which picks the rates"
                (store.folder / f"{plan.name}.toml").write_text(plan_text(there, heading))


class Runner:
    """Trains what cells ask for, runs that fit together in one pass, until all cells have ended or time is up."""

    def __init__(self, workers: int, bank: int, until: float) -> None:
        self.workers, self.bank, self.until = workers, bank, until
        self.begun, self.tried, self.done = time.monotonic(), set[ht.RunSpec](), 0

    def go(self, plans: list[Plan], executor: Executor, *, train: bool) -> None:
        cells: dict[Cell, tuple[int, Plan]] = {
            cell: (rank, plan) for rank, plan in enumerate(plans) for cell in plan.cells()
        }
        waiting = {cell: self._next_wish(cell) for cell in cells}
        flying: dict[Future[list[Attempt]], Bank] = {}
        while True:
            self._advance(cells, waiting, train)
            queue = self._queue(cells, waiting, flying) if train else {}
            while queue and len(flying) < self.workers and time.monotonic() < self.until:
                bank, plan = self._next(queue)
                for spec in bank.specs:
                    del queue[spec]
                keep = "vectors" if bank.specs[0] in plan.with_vectors else "nothing"
                flying[executor.submit(train_bank, bank, plan.store.folder, keep)] = bank
            other = [wanted for wanted in waiting.values() if isinstance(wanted, Future)]
            if not flying and not other:
                return
            left = self.until + GRACE - time.monotonic()
            done = wait([*flying, *other], min(left, 1e6), FIRST_COMPLETED).done
            if not done:
                print(f"time is up, {len(flying)} banks are left unfinished", flush=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                return
            for future in done & flying.keys():
                self._ended(flying.pop(future), future)

    def _advance(self, cells: dict[Cell, tuple[int, Plan]], waiting: dict[Cell, object], train: bool) -> None:
        """Let every cell go on that has what it asked for, or whose runs were all tried."""
        moved = True
        while moved:
            moved = False
            for cell, wanted in list(waiting.items()):
                store = cells[cell][1].store
                if isinstance(wanted, Future):
                    ready = wanted.done()
                elif callable(wanted):
                    ready = wanted()
                else:
                    missing = [spec for spec in wanted or () if spec not in store]
                    ready = all(spec in self.tried for spec in missing) if train else True
                if ready:
                    moved = True
                    waiting[cell] = self._next_wish(cell)
                    if waiting[cell] is None:
                        del waiting[cell]

    def _next_wish(self, cell: Cell) -> Wanted | None:
        """What a cell asks for next; None if it has ended, or failed, which ends no other."""
        try:
            return next(cell, None)
        except Exception:
            traceback.print_exc()
            return None

    def _queue(
        self, cells: dict[Cell, tuple[int, Plan]], waiting: dict[Cell, object], flying: dict[object, Bank]
    ) -> dict[ht.RunSpec, tuple[int, Plan]]:
        busy = {spec for bank in flying.values() for spec in bank.specs}
        return {
            spec: cells[cell]
            for cell, wanted in waiting.items()
            if isinstance(wanted, list)
            for spec in wanted
            if spec not in cells[cell][1].store and spec not in busy and spec not in self.tried
        }

    def _next(self, queue: dict[ht.RunSpec, tuple[int, Plan]]) -> tuple[Bank, Plan]:
        """Of the first plan that wants runs the largest bank."""
        first = min(rank for rank, _ in queue.values())
        groups: dict[tuple[int, bool], list[ht.RunSpec]] = defaultdict(list)
        for spec, (rank, plan) in queue.items():
            if rank == first:
                size = self.bank * (SHARE_FULL if spec.adapter == ht.FullFineTuning() else 1)
                size *= SHARE_LONG if spec.task in LONG else 1
                groups[max(1, int(size)), spec in plan.with_vectors].append(spec)
        made = [bank for (size, _), specs in groups.items() for bank in banks(specs, size)]
        largest = max(made, key=lambda bank: len(bank.specs))
        return largest, queue[largest.specs[0]][1]

    def _ended(self, bank: Bank, future: Future[list[Attempt]]) -> None:
        self.tried.update(bank.specs)
        attempts = [] if future.exception() else future.result()
        failed = [one for one in attempts if one.status == "failed"]
        self.done += len(attempts) - len(failed)
        minutes = (time.monotonic() - self.begun) / 60
        first = bank.specs[0]
        print(
            f"{minutes:.2f} min, {self.done} runs ({self.done / minutes:.0f} per minute): {len(bank.specs)} x "
            f"{label_of(first.adapter)}, {first.task} first"
            + (f"; {len(failed)} failed: {failed[0].reason}" if failed else "")
            + (f"; {future.exception()}" if future.exception() else ""),
            flush=True,
        )


def train_bank(bank: Bank, store: Path, keep: str) -> list[Attempt]:
    """What a worker does with a bank."""
    attempts = attempt(bank, ht.RunStore(store, keep=keep))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other processes on the card need it
    return attempts


if __name__ == "__main__":
    main()
