"""Which layers' adapters can be removed after training? (Chen et al. 2023 remove 4 of 12.)

The input is tables: learned vectors (`tables.vector_table`), and the scores of a run with only some of its layers kept
(`tables.measured_table(store, "removal")`, measured by `measurements.removal`). A subset of layers is written as text:
`"0,2,5"`, or `""` for none. **Layers are chosen on held-out rows only; test rows score what was chosen.**
`layer_ablation_tests` compares a choice with subsets of the same size that were drawn blindly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.hadamard import IDENTITY
from hadamard_toolkit.errors import ArgumentError, DataError, check_choice
from hadamard_toolkit.studies.frames import require_columns

RUN = ["key", "task", "seed"]
HELD_OUT, TEST = "validation", "test"
RULES = ("greedy", "norm", "consensus", "first", "last")
LEAVE_ONE_OUT = ("consensus",)  # the order of a task is a mean over the other tasks
FIXED = ("first", "last")  # one order for all tasks
ON_HELD_OUT_ROWS = ("taylor", "fisher")  # scores from the gradients of held-out rows


def write_kept(kept: Collection[int]) -> str:
    """A subset of layers as text: ascending, with commas; `""` for none."""
    return ",".join(str(layer) for layer in sorted(kept))


def read_kept(text: str) -> tuple[int, ...]:
    """The subset that `write_kept` wrote."""
    return tuple(int(layer) for layer in text.split(",")) if text else ()


def code_of(text: str) -> int:
    """The subset that `write_kept` wrote as a number: bit l says that layer l is kept."""
    return sum(2**layer for layer in read_kept(text))


def read_correct(text: str, n: int) -> np.ndarray:
    """`correct` of a removal table, packed bits in hex, as booleans [n]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)


# importance from what was learned --------------------------------------------------------------------------------


def layer_importance(
    vectors: pd.DataFrame | Mapping[str, np.ndarray], *, project: bool = True
) -> pd.DataFrame:
    """How far each layer's vectors moved from the identity: ‖W − 1‖ and ‖b‖, and per coordinate ‖·‖/√d.

    `vectors`: a table of `tables.vector_table`, or arrays `{"weight": [layers, d], "bias": [layers, d]}` of one run.
    With `project`, b is taken without its mean, which the norm behind W_O subtracts (pass False for the other
    placement). Columns: `key`, `task`, `seed` (of a table), `layer`, `vector` (`"weight"`, `"bias"` or `"both"`: the
    root of the sum of both squares), `l2`, `rms`. A layer without an adapter has no rows.
    """
    if not isinstance(vectors, pd.DataFrame):
        return _norms_of_arrays(vectors, project)
    parts = []
    for run, rows in vectors.groupby(RUN, sort=False):
        wide = rows.pivot(index="layer", columns=["vector", "coordinate"], values="value")
        norms = _norms_of_arrays(
            {str(vector): wide[vector].to_numpy() for vector in sorted(set(rows["vector"]))}, project
        )
        norms["layer"] = wide.index.to_numpy()[norms["layer"]]
        fixed: dict[str, Any] = dict(zip(RUN, run, strict=True))
        parts.append(norms.assign(**fixed))
    return pd.concat(parts, ignore_index=True)[[*RUN, "layer", "vector", "l2", "rms"]]


def _norms_of_arrays(vectors: Mapping[str, np.ndarray], project: bool) -> pd.DataFrame:
    for name, array in vectors.items():
        check_choice("vectors", name, IDENTITY)
        if np.ndim(array) != 2:
            raise DataError(f"vectors[{name!r}] has shape {np.shape(array)}; it must be [layers, d]")
    squares: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for name, array in vectors.items():
        moved = np.asarray(array, dtype=float) - IDENTITY[name]
        if name == "bias" and project:
            moved = moved - moved.mean(axis=1, keepdims=True)
        squares[name], sizes[name] = (moved**2).sum(axis=1), moved.shape[1]
    if len(squares) == 2:
        squares["both"] = squares["weight"] + squares["bias"]
        sizes["both"] = sizes["weight"] + sizes["bias"]
    rows = [
        {"layer": layer, "vector": name, "l2": np.sqrt(square), "rms": np.sqrt(square / sizes[name])}
        for name, by_layer in squares.items()
        for layer, square in enumerate(by_layer)
        if np.isfinite(square)
    ]
    return pd.DataFrame(rows, columns=["layer", "vector", "l2", "rms"])


def taylor_scores(gradients: np.ndarray, change: np.ndarray) -> pd.DataFrame:
    """First-order Taylor and diagonal Fisher scores of layers, from gradients at the trained values.

    `gradients` [rows, layers, d] holds each row's ∂L_i/∂θ, `change` [layers, d] Δ = trained − backbone value. Removing
    a layer changes the mean loss by −Σ ḡΔ to first order: `increase` is that, `taylor` its size |Σ ḡΔ| (Molchanov et
    al. 2017, eq. 7), `fisher` ½ Σ mean_i(g_i²) Δ² (Theis et al. 2018, eq. 6). Columns: `layer`, `taylor`, `increase`,
    `fisher`, `n` (rows).
    """
    gradients, change = np.asarray(gradients, dtype=float), np.asarray(change, dtype=float)
    if gradients.ndim != 3 or gradients.shape[1:] != change.shape or not len(gradients):
        raise DataError(
            f"gradients of shape {gradients.shape} and change of shape {change.shape} do not fit; "
            "give [rows, layers, d] and [layers, d]"
        )
    increase = -(gradients.mean(axis=0) * change).sum(axis=1)
    fisher = 0.5 * ((gradients**2).mean(axis=0) * change**2).sum(axis=1)
    scores = {"taylor": np.abs(increase), "increase": increase, "fisher": fisher}
    return pd.DataFrame({"layer": range(len(change)), **scores, "n": len(gradients)})


# from tables of scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The scores of one split by subset of layers.

    `score` and `loss` [runs, 2 ** layers]: bit l of the column number says that layer l is kept; a score that was not
    measured is NaN, such a loss 0. `pool` [2 ** layers]: which subsets may be drawn blindly.
    """

    runs: pd.DataFrame
    layers: int
    score: np.ndarray
    loss: np.ndarray
    pool: np.ndarray

    @property
    def full(self) -> int:
        return 2**self.layers - 1

    def by_task(self) -> dict[str, np.ndarray]:
        """The row numbers of the runs of each task."""
        tasks = self.runs["task"].to_numpy(dtype=object)
        return {str(task): np.flatnonzero(tasks == task) for task in sorted(set(tasks))}

    def of_size(self, size: int) -> np.ndarray:
        """Columns of the subsets of `size` layers that may be drawn blindly, and were scored in every run."""
        sizes = np.bitwise_count(np.arange(2**self.layers, dtype=np.uint32))
        return np.flatnonzero((sizes == size) & self.pool & np.isfinite(self.score).all(axis=0))


def read_grid(removals: pd.DataFrame, split: str) -> Grid:
    """The rows of `split` of a removal table, checked: runs of one depth, each with the score of all layers kept."""
    require_columns("removals", removals, *RUN, "kept", "split", "score")
    check_choice("split", split, sorted(set(removals["split"])))
    rows = removals[removals["split"] == split]
    if (twice := rows.duplicated([*RUN, "kept"])).any():
        raise DataError(
            f"removals has more than one row for {rows.loc[twice, [*RUN, 'kept']].iloc[0].to_dict()}"
        )
    codes = rows["kept"].map(code_of)
    depths = sorted({int(code).bit_length() for code in codes.groupby(rows["key"]).max()})
    if len(depths) != 1:
        raise DataError(f"removals holds runs of {depths} layers; give those of one depth")
    [layers] = depths
    runs = rows[RUN].drop_duplicates("key").reset_index(drop=True)
    cells = (pd.Index(runs["key"]).get_indexer(rows["key"]), codes)
    score, loss = np.full((len(runs), 2**layers), np.nan), np.zeros((len(runs), 2**layers))
    score[cells] = rows["score"]
    if "loss" in rows.columns:
        loss[cells] = np.nan_to_num(rows["loss"])
    pool = np.ones(2**layers, dtype=bool)
    if "drawn" in rows.columns:
        pool[codes] = False
        pool[codes[rows["drawn"] != "rule"]] = True
    if np.isnan(score[:, -1]).any():
        raise DataError(f"removals has runs without the score of all {layers} layers kept")
    return Grid(runs, layers, score, loss, pool)


def leave_one_out(removals: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """What each layer is worth to the full adapter: score with all layers − score with all but this one.

    Columns: `key`, `task`, `seed`, `layer`, `full`, `without`, `drop`. Two layers that can replace each other both look
    worthless here; the removal curves show what removing both costs.
    """
    grid = read_grid(removals, split)
    tables = []
    for layer in range(grid.layers):
        without = grid.score[:, grid.full - 2**layer]
        full = grid.score[:, -1]
        tables.append(grid.runs.assign(layer=layer, full=full, without=without, drop=full - without))
    return pd.concat(tables).sort_values([*RUN, "layer"], kind="stable", ignore_index=True)


def greedy_elimination(removals: pd.DataFrame, *, split: str = HELD_OUT) -> pd.DataFrame:
    """Backward elimination of every run: step by step, remove the layer whose removal costs the held-out score least.

    Ties go to the smaller `loss` (where the table has it), then to a layer that is drawn by the run's key, as always
    taking the lower layer would give all runs an order in common. Columns: `key`, `task`, `seed`, `rule`, `size`
    (layers kept), `removed` (the layer removed last; −1 at the full size), `kept`.
    """
    if split == TEST:
        raise ArgumentError("split='test' is not allowed: layers are chosen on held-out rows")
    grid = read_grid(removals, split)
    orders = []
    for run, key in enumerate(grid.runs["key"]):
        drawn = np.random.default_rng(list(str(key).encode())).permutation(grid.layers)
        orders.append(greedy_order(grid.score[run], grid.loss[run], grid.layers, drawn))
        if len(orders[-1]) < grid.layers:
            left = write_kept(set(range(grid.layers)) - set(orders[-1]))
            raise DataError(f"removals lacks held-out scores on the greedy path of run {key} below {left!r}")
    return _paths(grid, {"greedy": orders})


def greedy_order(
    score: np.ndarray, loss: np.ndarray, layers: int, ties: np.ndarray | None = None
) -> list[int]:
    """Layers in the order of backward elimination by `score` [2 ** layers]; ends where a candidate was not scored.

    Among layers equal in score and loss, the one that comes first in `ties` is removed (without `ties`, the lowest).
    """
    rank = np.arange(layers) if ties is None else np.argsort(ties)
    code, order = 2**layers - 1, []
    while code:
        candidates = [layer for layer in range(layers) if code & 2**layer]
        left = [code - 2**layer for layer in candidates]
        if np.isnan(score[left]).any():
            break
        order.append(max(zip(score[left], -loss[left], -rank[candidates], candidates, strict=True))[3])
        code -= 2 ** order[-1]
    return order


def removal_paths(
    removals: pd.DataFrame, importance: pd.DataFrame | None = None, *, apart: Collection[Collection[str]] = ()
) -> pd.DataFrame:
    """What each rule keeps at each size, run by run; no rule sees test rows.

    Rules: `greedy` (`greedy_elimination`); `consensus` (the mean order of greedy over the runs of all *other* tasks,
    except tasks in a group of `apart` with it, such as tasks that share texts; absent where no task is left); `first`
    and `last` (the lowest or the highest layers are removed first); and each `rule` of `importance`, a table with
    `key`, `layer`, `value` (the least is removed first) and optional `rule` (default `norm`). Columns as in
    `greedy_elimination`.
    """
    grid = read_grid(removals, HELD_OUT)
    paths = [greedy_elimination(removals)]
    if (of_others := _consensus_orders(paths[0], grid, apart)) is not None:
        paths.append(_paths(grid, {"consensus": of_others}))
    if importance is not None:
        table = importance if "rule" in importance.columns else importance.assign(rule="norm")
        for rule, rows in table.groupby("rule", sort=False):
            wide = rows.pivot(index="key", columns="layer", values="value")
            values = wide.reindex(index=grid.runs["key"], columns=range(grid.layers)).to_numpy()
            if np.isnan(values).any():
                raise DataError(
                    f"importance lacks values of rule {rule!r} for some layer of some run of removals"
                )
            paths.append(_paths(grid, {str(rule): np.argsort(values, axis=1, kind="stable").tolist()}))
    upwards = list(range(grid.layers))
    ends = {"first": [upwards] * len(grid.runs), "last": [upwards[::-1]] * len(grid.runs)}
    return pd.concat([*paths, _paths(grid, ends)], ignore_index=True)


def _paths(grid: Grid, orders: Mapping[str, list[list[int]]]) -> pd.DataFrame:
    """Orders of removal, rule by rule and run by run, as a table of what is kept."""
    rows = [
        {
            **run,
            "rule": rule,
            "size": grid.layers - gone,
            "removed": removed,
            "kept": write_kept(order[gone:]),
        }
        for rule, by_run in orders.items()
        for run, order in zip(grid.runs.to_dict("records"), by_run, strict=True)
        for gone, removed in enumerate([-1, *order])
    ]
    return pd.DataFrame(rows)


def _consensus_orders(
    greedy: pd.DataFrame, grid: Grid, apart: Collection[Collection[str]]
) -> list[list[int]] | None:
    gone = greedy[greedy["removed"] >= 0].pivot(index="key", columns="removed", values="size")
    ranks = -gone.reindex(grid.runs["key"])  # the layer that is removed first has the largest size
    by_task = ranks.groupby(grid.runs["task"].to_numpy()).mean()
    orders = {}
    for task in by_task.index:
        near = {task}.union(*(group for group in apart if task in group))
        if (others := by_task[~by_task.index.isin(near)]).empty:
            return None
        orders[task] = others.mean().sort_values(kind="stable").index.tolist()
    return [orders[task] for task in grid.runs["task"]]


def removal_curves(removals: pd.DataFrame, paths: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """The score of what each rule kept: `paths` with `score`, `full` (of all layers) and `difference` = score − full.

    Subsets that were not scored on `split` are left out. A column `constant` (of `removal_table`) stays.
    """
    columns = ["key", "kept", "score", *removals.columns.intersection(["constant"])]
    rows = removals.loc[removals["split"] == split, columns]
    curves = paths.merge(rows, on=["key", "kept"], how="inner", validate="many_to_one")
    grid = read_grid(removals, split)
    full = curves["key"].map(dict(zip(grid.runs["key"], grid.score[:, -1], strict=True)))
    return curves.assign(full=full, difference=curves["score"] - full)


def subset_band(removals: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """What blindly drawn subsets score: per task and size the mean and the 5, 50 and 95 % points over subsets.

    A subset's score is its mean over the seeds of the task. Columns: `task`, `size`, `mean`, `low`, `middle`, `high`,
    `subsets`, `seeds`. Sizes without drawn subsets are absent.
    """
    grid = read_grid(removals, split)
    rows = []
    for task, runs in grid.by_task().items():
        for size in range(grid.layers + 1):
            if len(pool := grid.of_size(size)):
                means = grid.score[np.ix_(runs, pool)].mean(axis=0)
                low, middle, high = np.quantile(means, [0.05, 0.5, 0.95])
                band = {"mean": means.mean(), "low": low, "middle": middle, "high": high}
                rows.append({"task": task, "size": size, **band, "subsets": len(pool), "seeds": len(runs)})
    return pd.DataFrame(rows)
