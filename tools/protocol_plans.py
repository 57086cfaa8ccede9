"""What the plans of data/reference_runs/PROTOCOL.md train, step by step: see protocol_runs.py, which trains it.

A rate is picked on held-out rows before the seeds can be trained at it, so no plan file can say beforehand what to
train. A *cell* is the part of a plan that belongs to one task and method: a generator that yields the runs that it
needs and goes on when they were tried. One that yields a condition or a future goes on when that holds or is done.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.bases import load_basis

Wanted = list[ht.RunSpec] | Callable[[], bool] | Future[Any]
Cell = Generator[Wanted, None, float | None]

FAIR_TASKS = [
    "sst2",
    *(f"embedded/{name}-polarity" for name in ("movies", "products", "editorials", "tweets")),
    "embedded/domain-identification",
]
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
DOMAINS = ["acl-arc", "agnews", "chemprot", "hyperpartisan", "scierc"]
EMBEDDED = [
    *(
        f"embedded/{name}-{what}"
        for name in ("movies", "products", "editorials", "tweets")
        for what in ("polarity", "intensity")
    ),
    *(f"embedded/{name}" for name in ("domain-identification", "next-sentence", "word-order")),
]
LADDER = [float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3)]
VECTORS, MATRICES, FULL = LADDER[7:12], LADDER[6:11], LADDER[3:8]
COEFFICIENTS = LADDER[10:13]
BEYOND = 2  # rates that are tried at most beyond the grid
HEAD, BOTH_NORMS, VECTORS_ALONE = ht.HeadOnly(), ht.LayerNormTuning(norm="both"), ht.Hadamard(norm=None)


class Plan:
    """One plan file: its cells, the runs that they asked for, and what is picked so far."""

    def __init__(self, store: ht.RunStore, name: str, comment: str) -> None:
        self.store, self.name, self.comment = store, name, comment
        self.asked: dict[ht.RunSpec, None] = {}
        self.with_vectors: set[ht.RunSpec] = set()  # runs whose trained vectors are kept
        self.picked: dict[tuple[str, object], float | None] = {}

    def cells(self) -> list[Cell]:
        raise NotImplementedError

    def need(self, specs: Iterable[ht.RunSpec], *, vectors: bool = False) -> Generator[Wanted, None, bool]:
        """Ask for runs; whether all of them are there afterwards."""
        specs = list(specs)
        self.asked.update(dict.fromkeys(specs))
        if vectors:
            self.with_vectors.update(specs)
        yield specs
        return all(spec in self.store for spec in specs)

    def pick(
        self,
        task: str,
        name: object,
        rates: Iterable[float],
        spec: Callable[[float], ht.RunSpec],
        beyond: int = BEYOND,
    ) -> Cell:
        """The rate with the best score on held-out rows, extended while it lies at an edge; None if a run failed."""
        tried = {rate: spec(rate) for rate in rates}
        rate = None
        for left in range(beyond, -1, -1):
            if not (yield from self.need(tried.values())):
                break
            rate = max(tried, key=lambda rate: self._held_out(tried[rate]))
            outside = {max(tried): 1, min(tried): -1}.get(rate, 0)
            place = LADDER.index(rate) + outside
            if not outside or not left or not 0 <= place < len(LADDER):
                break
            tried[LADDER[place]] = spec(LADDER[place])
        self.picked[task, name] = rate
        return rate

    def _held_out(self, spec: ht.RunSpec) -> tuple[float, float]:
        record = self.store.record(spec.key)
        scores = record["metrics"]["validation"]
        score, loss = scores[record["headline"]], scores["loss"]
        return (-math.inf if score is None else score), (-math.inf if loss is None else -loss)


class TwoStages(Plan):
    """The head's rate first, then each method at its own rates, then the seeds."""

    tasks: list[str]
    sizes: dict[str, object]
    methods: dict[
        ht.Adapter, tuple[list[float], bool]
    ]  # adapter -> its rates, and whether the head trains first
    pick_seed, seeds = 0, list(range(5))
    keep_vectors: tuple[ht.Adapter, ...] = ()

    def spec(self, task: str, adapter: ht.Adapter, rate: float, head: float | None, seed: int) -> ht.RunSpec:
        """`rate` is that of the stage that is picked for; `head` that of stage one, where there is one before it."""
        if adapter == HEAD:
            protocol = ht.protocols.hadamard(head_learning_rate=rate, **self.sizes)
        elif self.methods[adapter][1]:
            protocol = ht.protocols.hadamard(learning_rate=rate, head_learning_rate=head, **self.sizes)
        else:
            protocol = ht.protocols.full_fine_tuning(learning_rate=rate, **self.sizes)
        return ht.RunSpec("minilm-l6", task, adapter, protocol, seed=seed)

    def cells(self) -> list[Cell]:
        return [self._cell(task, adapter) for adapter in self.methods for task in self.tasks]

    def _cell(self, task: str, adapter: ht.Adapter) -> Cell:
        rates, head_first = self.methods[adapter]
        head = None
        if head_first and adapter != HEAD:
            yield lambda: (task, HEAD) in self.picked
            head = self.picked[task, HEAD]
        rate = None
        if not head_first or adapter == HEAD or head is not None:
            rate = yield from self.pick(
                task, adapter, rates, lambda rate: self.spec(task, adapter, rate, head, self.pick_seed)
            )
        if rate is not None:
            specs = [self.spec(task, adapter, rate, head, seed) for seed in self.seeds]
            yield from self.need(specs, vectors=adapter in self.keep_vectors)
        self.picked[task, (adapter, "seeds")] = rate
        return rate


class Fair(TwoStages):
    """Eight methods on 300 rows of six tasks."""

    tasks = FAIR_TASKS
    sizes = {
        "train_rows": 300,
        "validation_rows": 200,
        "test_rows": 400,
        "batch_size": 16,
        "epochs": 10,
        "precision": "bf16",
    }
    methods = {
        HEAD: (VECTORS, True),
        ht.Hadamard(): (VECTORS, True),
        BOTH_NORMS: (VECTORS, True),
        ht.FullFineTuning(): (FULL, False),
        ht.LayerNormTuning(): (VECTORS, True),
        ht.BitFit(): (VECTORS, False),
        ht.LoRA(): (MATRICES, False),
        ht.Pfeiffer(): (MATRICES, False),
    }


class Wide(TwoStages):
    """The vectors of W and b, and of both norms, on all tasks that are here: what notebook 11 makes directions of."""

    tasks = [*EMBEDDED, *GLUE, *DOMAINS]
    sizes = {**Fair.sizes, "train_rows": 500, "validation_rows": 200, "test_rows": 500}
    methods = {HEAD: (VECTORS, True), VECTORS_ALONE: (VECTORS, True), BOTH_NORMS: (VECTORS, True)}
    seeds = [1, 2, 3]
    keep_vectors = (VECTORS_ALONE, BOTH_NORMS)


class Subspace(Plan):
    """k coefficients on directions of the vectors that `wide` trained; one rate per task and kind of directions."""

    ks, seeds = (1, 4, 16), (1, 2, 3)
    kinds = ("other tasks", "random", "own seeds", "permuted", "norm changes")
    pick_k = 4

    def __init__(self, store: ht.RunStore, name: str, comment: str, wide: Wide, executor: Executor) -> None:
        super().__init__(store, name, comment)
        self.wide, self.executor = wide, executor
        self.specs: dict[tuple[str, str], list[ht.RunSpec]] = {}

    def cells(self) -> list[Cell]:
        return [self._bases(), *(self._cell(task, kind) for kind in self.kinds for task in self.wide.tasks)]

    def _bases(self) -> Cell:
        """Wait for the vectors of all tasks and make the bases in a worker."""
        ended = [(task, (adapter, "seeds")) for task in self.wide.tasks for adapter in self.wide.keep_vectors]
        yield lambda: all(one in self.wide.picked for one in ended)
        there = [spec for spec in self.wide.with_vectors if spec in self.store]
        tasks = sorted({spec.task for spec in there if spec.adapter == VECTORS_ALONE})
        made = self.executor.submit(bases, self.store.only(there), tasks, self.kinds, self.ks, self.seeds)
        yield made
        for (task, kind), specs in made.result().items():
            self.specs[task, kind] = specs
        self.picked["bases", None] = 1.0
        return None

    def _cell(self, task: str, kind: str) -> Cell:
        yield lambda: ("bases", None) in self.picked
        specs = self.specs.get((task, kind), [])
        if not specs:
            return None
        k = max(spec.adapter.k for spec in specs if spec.adapter.k <= self.pick_k)
        first = next(spec for spec in specs if spec.adapter.k == k and spec.seed == self.seeds[0])
        rate = yield from self.pick(task, kind, COEFFICIENTS, lambda rate: _at(first, rate))
        if rate is not None:
            yield from self.need(_at(spec, rate) for spec in specs)
        return rate


def _at(spec: ht.RunSpec, rate: float) -> ht.RunSpec:
    return replace(spec, protocol=replace(spec.protocol, learning_rate=rate))


def bases(
    store: ht.RunStore, tasks: list[str], kinds: tuple[str, ...], ks: tuple[int, ...], seeds: tuple[int, ...]
) -> dict[tuple[str, str], list[ht.RunSpec]]:
    """The specs of `studies.subspace_plan` by task and kind, at a rate to be replaced."""
    found = defaultdict(list)
    for spec in ht.studies.subspace_plan(store, tasks, kinds, ks, seeds, learning_rate=1.0):
        if isinstance(spec.adapter, ht.Subspace):
            found[spec.task, load_basis(spec.adapter.basis).made["kind"]].append(spec)
    return dict(found)


class Removal(Plan):
    """The Hadamard adapter retrained on every set of four of six layers, at the rates that `fair` picked."""

    tasks = ["sst2", "embedded/movies-polarity", "embedded/tweets-polarity", "embedded/domain-identification"]
    seeds = [0, 1, 2]

    def __init__(self, store: ht.RunStore, name: str, comment: str, fair: Fair) -> None:
        super().__init__(store, name, comment)
        self.fair = fair

    def cells(self) -> list[Cell]:
        sets = itertools.combinations(range(6), 4)
        return [self._cell(ht.Hadamard(layers=layers)) for layers in sets]

    def _cell(self, adapter: ht.Adapter) -> Cell:
        whole = ht.Hadamard()
        yield lambda: all((task, whole) in self.fair.picked for task in self.tasks)
        specs = []
        for task in self.tasks:
            rate, head = self.fair.picked[task, whole], self.fair.picked[task, HEAD]
            if rate is not None and head is not None:
                made = (self.fair.spec(task, whole, rate, head, seed) for seed in self.seeds)
                specs += [
                    ht.RunSpec(one.backbone, task, adapter, one.protocol, seed=one.seed) for one in made
                ]
        yield from self.need(specs)
        return None


class Pruned(Plan):
    """LoRA with 80 % removed by SNIP, its controls, dense and small dense LoRA; a rate for each."""

    DENSE = ht.LoRA(init="normal")
    WAYS: dict[str, tuple[ht.Adapter, ht.Sparsity | None]] = {
        "dense": (DENSE, None),
        "small dense": (ht.LoRA(rank=2, init="normal"), None),
        "random": (DENSE, ht.Sparsity("random", 0.8, examples=256)),
        "snip": (DENSE, ht.Sparsity("snip", 0.8, examples=256)),
        "shuffled": (DENSE, ht.Sparsity("snip", 0.8, examples=256, control="shuffled")),
        "margins": (DENSE, ht.Sparsity("snip", 0.8, examples=256, control="margins")),
    }
    sizes = Fair.sizes
    seeds = [0, 1, 2]

    def cells(self) -> list[Cell]:
        return [self._cell(task, way) for way in self.WAYS for task in FAIR_TASKS]

    def _cell(self, task: str, way: str) -> Cell:
        adapter, sparsity = self.WAYS[way]

        def spec(rate: float, seed: int = 0) -> ht.RunSpec:
            protocol = ht.protocols.sparse_adapter(learning_rate=rate, **self.sizes)
            return ht.RunSpec("minilm-l6", task, adapter, protocol, sparsity, seed)

        rate = yield from self.pick(task, way, MATRICES, spec)
        if rate is not None:
            yield from self.need(spec(rate, seed) for seed in self.seeds)
        return rate


class Few(Plan):
    """UniPELT's family with K = 100 and 500 rows, by its authors' protocol, a rate for each."""

    tasks = ["sst2", "mrpc", "rte", "cola"]
    UNIPELT = ht.UniPELT()
    METHODS: dict[ht.Adapter, list[float]] = {
        HEAD: VECTORS,
        UNIPELT: MATRICES,
        ht.Stack(ht.PromptTuning(), UNIPELT): MATRICES,
        ht.UniPELT(gated=None): MATRICES,
        ht.FullFineTuning(): FULL,
    }
    seeds = list(range(5))

    def cells(self) -> list[Cell]:
        return [
            self._cell(task, adapter, k)
            for k in (100, 500)
            for adapter in self.METHODS
            for task in self.tasks
        ]

    def _cell(self, task: str, adapter: ht.Adapter, k: int) -> Cell:
        def spec(rate: float, seed: int = 0) -> ht.RunSpec:
            sizes = {"precision": "bf16", "test_rows": 400}
            if adapter == HEAD:
                protocol = ht.protocols.hadamard(
                    head_learning_rate=rate, batch_size=16, train_rows=k, validation_rows=1000, **sizes
                )
            else:
                protocol = ht.protocols.unipelt(k=k, learning_rate=rate, epochs=20, patience=5, **sizes)
            return ht.RunSpec("minilm-l6", task, adapter, protocol, seed=seed)

        rate = yield from self.pick(task, (adapter, k), self.METHODS[adapter], spec)
        if rate is not None:
            yield from self.need(spec(rate, seed) for seed in self.seeds)
        return rate
