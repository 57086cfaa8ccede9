"""Which layers' adapters can go, and is that better than chance? (Chen et al. 2023 drop 4 of 12 layers.)

Everything here is computed from tables: learned vectors (`tables.vector_table`), and the scores of a run with only some
of its layers kept (`tables.measured_table(store, "removal")`; made by `measurements.removal`). A subset of layers is
written as text, `"0,2,5"`, and `""` is none. **Layers are chosen on held-out rows only; test rows score what was
chosen.** The null is always a subset of the same size that was drawn blindly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.hadamard import IDENTITY
from hadamard_toolkit.errors import ArgumentError, DataError, check_choice

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


def read_correct(text: str, n: int) -> np.ndarray:
    """`correct` of a removal table, packed bits in hex, as booleans [n]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)


# importance from what was learned --------------------------------------------------------------------------------


def layer_importance(
    vectors: pd.DataFrame | Mapping[str, np.ndarray], *, project: bool = True
) -> pd.DataFrame:
    """How far each layer's vectors moved from the identity: ‖W − 1‖ and ‖b‖, and per coordinate ‖·‖/√d.

    `vectors`: a table of `tables.vector_table`, or arrays `{"weight": [layers, d], "bias": [layers, d]}` of one run.
    With `project`, b is taken without its mean: behind W_O a norm subtracts it, so it does nothing (pass False for
    the other placement). Columns: `key`, `task`, `seed` (of a table), `layer`, `vector` (`"weight"`, `"bias"` or
    `"both"`: the root of both squares together), `l2`, `rms`. Rows of a layer without an adapter are absent.
    """
    if not isinstance(vectors, pd.DataFrame):
        return _norms_of_arrays(vectors, project)
    parts = []
    for run, rows in vectors.groupby(RUN, sort=False):
        arrays = {
            str(vector): part.pivot(index="layer", columns="coordinate", values="value")
            for vector, part in rows.groupby("vector")
        }
        layers = sorted(set().union(*(array.index for array in arrays.values())))
        norms = _norms_of_arrays(
            {name: array.reindex(layers).to_numpy() for name, array in arrays.items()}, project
        )
        norms["layer"] = norms["layer"].map(dict(enumerate(layers)))
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

    `gradients` [rows, layers, d] holds each row's ∂L_i/∂θ, `change` [layers, d] Δ = trained − backbone value. To go
    back by Δ changes the mean loss by −Σ ḡΔ to first order: `increase` is that, `taylor` its size |Σ ḡΔ| (Molchanov
    et al. 2017, eq. 7), `fisher` ½ Σ mean_i(g_i²) Δ² (Theis et al. 2018, eq. 6). Columns: `layer`, `taylor`,
    `increase`, `fisher`, `n` (rows).
    """
    gradients, change = np.asarray(gradients, dtype=float), np.asarray(change, dtype=float)
    if gradients.ndim != 3 or gradients.shape[1:] != change.shape or not len(gradients):
        raise DataError(
            f"gradients of shape {gradients.shape} and change of shape {change.shape} do not fit; "
            "give [rows, layers, d] and [layers, d]"
        )
    increase = -(gradients.mean(axis=0) * change).sum(axis=1)
    fisher = 0.5 * ((gradients**2).mean(axis=0) * change**2).sum(axis=1)
    told = {"taylor": np.abs(increase), "increase": increase, "fisher": fisher, "n": len(gradients)}
    return pd.DataFrame({"layer": range(len(change)), **told})


# from tables of scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Scores of one split as arrays [runs, 2 ** layers]: bit l of the column says that layer l is kept; NaN: not
    scored."""

    runs: pd.DataFrame
    layers: int
    score: np.ndarray
    loss: np.ndarray
    pool: np.ndarray

    @property
    def full(self) -> int:
        return 2**self.layers - 1

    def by_task(self) -> dict[str, np.ndarray]:
        """Task to the places of its runs."""
        tasks = self.runs["task"].to_numpy(dtype=object)
        return {str(task): np.flatnonzero(tasks == task) for task in sorted(set(tasks))}

    def of_size(self, size: int) -> np.ndarray:
        """Columns of the subsets of `size` layers that may be drawn blindly, and were scored in every run."""
        sizes = np.bitwise_count(np.arange(2**self.layers, dtype=np.uint32))
        return np.flatnonzero((sizes == size) & self.pool & np.isfinite(self.score).all(axis=0))


def _grid(removals: pd.DataFrame, split: str) -> _Grid:
    missing = [column for column in (*RUN, "kept", "split", "score") if column not in removals.columns]
    if missing:
        raise ArgumentError(f"removals has no column {', '.join(map(repr, missing))}")
    check_choice("split", split, sorted(set(removals["split"])))
    rows = removals[removals["split"] == split]
    if (twice := rows.duplicated([*RUN, "kept"])).any():
        raise DataError(
            f"removals has more than one row for {rows.loc[twice, [*RUN, 'kept']].iloc[0].to_dict()}"
        )
    depth = {
        key: 1 + max((max(read_kept(kept), default=-1)) for kept in part)
        for key, part in rows.groupby("key")["kept"]
    }
    if len(set(depth.values())) != 1:
        raise DataError(
            f"removals holds runs of {sorted(set(depth.values()))} layers; give those of one depth"
        )
    layers = next(iter(depth.values()))
    codes = {kept: sum(2**layer for layer in read_kept(kept)) for kept in set(rows["kept"])}
    runs = rows[RUN].drop_duplicates("key").reset_index(drop=True)
    place = (rows["key"].map(dict(zip(runs["key"], runs.index, strict=True))), rows["kept"].map(codes))
    score, loss = np.full((2, len(runs), 2**layers), np.nan)
    score[place] = rows["score"]
    if "loss" in rows.columns:
        loss[place] = rows["loss"]
    pool = np.ones(2**layers, dtype=bool)
    if "drawn" in rows.columns:
        pool[list(codes.values())] = False
        pool[[codes[kept] for kept in rows.loc[rows["drawn"] != "rule", "kept"]]] = True
    if np.isnan(score[:, -1]).any():
        raise DataError(f"removals has runs without the score of all {layers} layers kept")
    return _Grid(runs, layers, score, np.nan_to_num(loss), pool)


def leave_one_out(removals: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """What each layer is worth to the full adapter: score with all layers − score with all but this one.

    Columns: `key`, `task`, `seed`, `layer`, `full`, `without`, `drop`. Two layers that can stand in for one another
    both look worthless here; the removal curves tell them apart.
    """
    grid = _grid(removals, split)
    tables = []
    for layer in range(grid.layers):
        without = grid.score[:, grid.full - 2**layer]
        full = grid.score[:, -1]
        tables.append(grid.runs.assign(layer=layer, full=full, without=without, drop=full - without))
    return pd.concat(tables).sort_values([*RUN, "layer"], kind="stable", ignore_index=True)


def greedy_elimination(removals: pd.DataFrame, *, split: str = HELD_OUT) -> pd.DataFrame:
    """Backward elimination of every run: again and again, remove the layer whose loss costs the held-out score least.

    Equal scores go to the smaller `loss` (where the table has it), then to a layer that is drawn by the run's key: the
    lower layer every time would be an order that all runs share. Columns: `key`, `task`, `seed`, `rule`, `size` (layers
    kept), `removed` (the layer that went; −1 at the full size), `kept`.
    """
    if split == TEST:
        raise ArgumentError("split='test' is not allowed: layers are chosen on held-out rows")
    grid = _grid(removals, split)
    orders = []
    for run, key in enumerate(grid.runs["key"]):
        drawn = np.random.default_rng(list(str(key).encode())).permutation(grid.layers)
        orders.append(greedy_order(grid.score[run], grid.loss[run], grid.layers, drawn))
        if len(orders[-1]) < grid.layers:
            left = grid.full - sum(2**layer for layer in orders[-1])
            raise DataError(
                f"removals lacks held-out scores on the greedy path of run {key} below {_text(left)!r}"
            )
    return _paths(grid, {"greedy": orders})


def greedy_order(
    score: np.ndarray, loss: np.ndarray, layers: int, ties: np.ndarray | None = None
) -> list[int]:
    """Layers in the order of backward elimination by scores [2 ** layers]; it ends where a candidate was not scored.

    Of layers equal in score and loss, the one that stands first in `ties` goes, or the lowest.
    """
    place = np.arange(layers) if ties is None else np.argsort(ties)
    code, order = 2**layers - 1, []
    while code:
        candidates = [layer for layer in range(layers) if code & 2**layer]
        places = [code - 2**layer for layer in candidates]
        if np.isnan(score[places]).any():
            break
        order.append(max(zip(score[places], -loss[places], -place[candidates], candidates, strict=True))[3])
        code -= 2 ** order[-1]
    return order


def removal_paths(
    removals: pd.DataFrame, importance: pd.DataFrame | None = None, *, apart: Collection[Collection[str]] = ()
) -> pd.DataFrame:
    """What each rule keeps at each size, run by run; no rule sees test rows.

    Rules: `greedy` (`greedy_elimination`); `consensus` (layers in the mean order in which greedy removed them in the
    runs of all *other* tasks, but those in one group of `apart` with it, such as tasks that
    share texts; absent where no task is left); `first` and `last` (layers 0, 1, … or the last ones go first); and
    each `rule` of `importance`, a table with `key`, `layer`, `value` (least goes first) and optional `rule` (default
    `norm`). Columns as in `greedy_elimination`.
    """
    grid = _grid(removals, HELD_OUT)
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


def _paths(grid: _Grid, orders: Mapping[str, list[list[int]]]) -> pd.DataFrame:
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
    greedy: pd.DataFrame, grid: _Grid, apart: Collection[Collection[str]]
) -> list[list[int]] | None:
    gone = greedy[greedy["removed"] >= 0].pivot(index="key", columns="removed", values="size")
    ranks = -gone.reindex(grid.runs["key"])  # a layer that goes first has the largest size beside it
    by_task = ranks.groupby(grid.runs["task"].to_numpy()).mean()
    orders = {}
    for task in by_task.index:
        near = {task}.union(*(group for group in apart if task in group))
        if (others := by_task[~by_task.index.isin(near)]).empty:
            return None
        mean = others.mean()
        orders[task] = mean.sort_values(kind="stable").index.tolist()
    return [orders[task] for task in grid.runs["task"]]


def removal_curves(removals: pd.DataFrame, paths: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """The score of what each rule kept: `paths` with `score`, `full` (of all layers) and `difference` = score − full.

    Subsets of a rule that were not scored on `split` are left out.
    """
    rows = removals.loc[removals["split"] == split, ["key", "kept", "score"]]
    found = paths.merge(rows, on=["key", "kept"], how="inner", validate="many_to_one")
    grid = _grid(removals, split)
    full = found["key"].map(dict(zip(grid.runs["key"], grid.score[:, -1], strict=True)))
    return found.assign(full=full, difference=found["score"] - full)


def subset_band(removals: pd.DataFrame, *, split: str = TEST) -> pd.DataFrame:
    """What blindly drawn subsets score: per task and size the mean and the 5, 50 and 95 % points over subsets.

    A subset's score is its mean over the seeds of the task. Columns: `task`, `size`, `mean`, `low`, `middle`, `high`,
    `subsets`, `seeds`. Sizes without drawn subsets are absent.
    """
    grid = _grid(removals, split)
    rows = []
    for task, runs in grid.by_task().items():
        for size in range(grid.layers + 1):
            if len(pool := grid.of_size(size)):
                means = grid.score[np.ix_(runs, pool)].mean(axis=0)
                low, middle, high = np.quantile(means, [0.05, 0.5, 0.95])
                told = {"task": task, "size": size, "mean": means.mean(), "low": low, "middle": middle}
                rows.append({**told, "high": high, "subsets": len(pool), "seeds": len(runs)})
    return pd.DataFrame(rows)


def _text(code: int) -> str:
    return write_kept([layer for layer in range(code.bit_length()) if code >> layer & 1])
