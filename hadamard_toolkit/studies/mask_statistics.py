"""What masks have in common, and how much of it is explained by chance and by a shared initialisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import gammaln

from hadamard_toolkit.errors import ArgumentError, DataError, check_choice, check_range
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.margins import margin_chances, margin_moments

if TYPE_CHECKING:
    from hadamard_toolkit.sparsity.masks import Masks

Arrays = Mapping[str, np.ndarray]
FACTS = ["adapter", "task", "scorer", "sparsity", "control", "init_seed", "data_seed"]
NO_CONTROL = "none"
FEW = 1.5  # expected dead units; below, the normal interval leaves out up to 0.16 of even masks
# the tensor that leads into the units of a bottleneck (its rows), and the one that leads out (its columns)
UNITS = (("down.weight", "up.weight"), ("A", "B"))


@dataclass(frozen=True)
class MaskRun:
    """The masks of one run as arrays, and how they were made.

    kept: bool arrays by tensor name, True where an entry stays. places: `Masks.table()` (index name; layer, site,
    entries, kept). init_seed: seed of the weights that were scored; runs of one seed share it whatever their task.
    data_seed: seed of the rows that they were scored on, None for scorers without data.
    """

    key: str
    adapter: str
    task: str
    scorer: str
    sparsity: float
    control: str
    init_seed: int
    data_seed: int | None
    kept: dict[str, np.ndarray]
    places: pd.DataFrame

    @classmethod
    def of(cls, masks: Masks, *, key: str, task: str, adapter: str = "") -> MaskRun:
        """From `store.masks(key)`, with the task of the run, which the masks do not record."""
        made = masks.provenance
        return cls(
            key=key,
            adapter=adapter or str(made["adapter"]["adapter"]),
            task=task,
            scorer=str(made["scorer"]),
            sparsity=float(made["sparsity"]),
            control=str(made.get("control") or NO_CONTROL),
            init_seed=masks.init_seed,
            data_seed=masks.data_seed,
            kept=masks.arrays(),
            places=masks.table("tensor"),
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {"key": self.key, **{name: getattr(self, name) for name in FACTS}}


def mask_runs(store: RunStore) -> list[MaskRun]:
    """The masks of every pruned run in a store, sorted by adapter, task, scorer, sparsity, control and seed."""
    from hadamard_toolkit.studies.tables import sparse_table

    table = store.load()
    pruned = set(table.loc[table["sparsity"] != "null", "key"])
    named = sparse_table(store)
    named = named[named["key"].isin(pruned)]
    runs = [
        MaskRun.of(store.masks(key), key=key, task=task, adapter=adapter)
        for key, task, adapter in named[["key", "task", "adapter"]].itertuples(index=False, name=None)
    ]
    return sorted(runs, key=lambda run: (*[str(run.facts[name]) for name in FACTS], run.key))


def density_table(runs: list[MaskRun], *, by: str = "layer") -> pd.DataFrame:
    """Share kept by tensor, layer or site: key, adapter, task, scorer, …, `by`, entries, kept, density."""
    check_choice("by", by, ("tensor", "layer", "site"))
    parts = []
    for run in runs:
        tensors = run.places.reset_index(names="tensor")
        sums = tensors.groupby(by, dropna=False, sort=False)[["entries", "kept"]].sum().reset_index()
        parts.append(sums.assign(density=sums["kept"] / sums["entries"], **run.facts))
    columns = ["key", *FACTS, by, "entries", "kept", "density"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def overlap(first: Arrays, second: Arrays, *, level: float = 0.95) -> dict[str, float]:
    """How much two masks have in common beyond chance, under two nulls.

    Null of densities: within each tensor both masks are drawn evenly, with as many entries as they keep there. The
    number of shared entries of a tensor of N entries, k and m of them kept, is then hypergeometric, with mean km/N and
    variance km(N − k)(N − m)/(N²(N − 1)), and the sum over tensors is close to normal. Masks by a global threshold
    concentrate in some layers; a null without the tensors would take that for overlap.

    Null of margins: within each tensor each mask also keeps its number of entries in every row and every column
    (`margins.margin_chances`). Masks that share only a preference for some units and hidden coordinates overlap under
    the first null and hardly under this one, so what exceeds the second null is closer to an agreement on weights. It
    is exact for masks shuffled within their margins; preferences that add up before a threshold leave a
    `margin_corrected` of up to 0.03, which with many entries is significant: read its size, not its p alone.

    Returns `jaccard` J = |A∩B|/|A∪B|; `shared`, the share of the smaller mask that the other keeps too; `expected` J₀
    under the null of densities (to second order) and `corrected` = (J − J₀)/(1 − J₀), 0 by chance and 1 for identical
    masks; `low` and `high`, between which `corrected` falls under the null with probability `level`; `p`, the
    probability of as much overlap or more; the same under the null of margins as `margin_expected`, …, `margin_p`; and
    `naive`, `corrected` with one density for all tensors. A corrected value is NaN where its null leaves no choice.

    `corrected` is not the share of entries that were planted in both masks. Where that share is 0.05, 0.2, 0.5 and 0.9,
    and all else is drawn evenly, it is 0.02, 0.09, 0.29 and 0.79 (densities of 0.02 to 0.4), as J counts each entry
    that is not shared twice. Generalises to: nothing beyond these two masks, given their densities or margins.

    Simulated: at 0.05, masks that share nothing but their densities are rejected in 0.04 under both nulls; masks that
    share only which units and coordinates they prefer in 0.88 to 1.00 under densities and 0.05 to 0.06 under margins
    (shuffled within margins 0.06; log-normal scores times preferences 0.10 to 0.33 at 0.6 kept, heavy tails 0.11 to
    0.60). A planted share of 0.05 is found in 0.99 under both, one of 0.01 in 0.17.
    `pytest tests/studies/test_margins.py`.
    """
    return _overlap(first, second, _chances(first), _chances(second), level)


def _chances(kept: Arrays) -> Arrays:
    return {name: margin_chances(mask) for name, mask in kept.items()}


def _overlap(
    first: Arrays, second: Arrays, chances: Arrays, other_chances: Arrays, level: float
) -> dict[str, float]:
    check_range("level", level, above=0, below=1)
    if set(first) != set(second) or any(first[name].shape != second[name].shape for name in first):
        raise ArgumentError(
            "two masks over different tensors cannot be compared; they need the same names and shapes"
        )
    counts = np.array(
        [
            (first[name].size, first[name].sum(), second[name].sum(), (first[name] & second[name]).sum())
            for name in first
        ],
        dtype=float,
    )
    entries, kept, other, both = counts.T
    observed = {"total": kept.sum() + other.sum(), "both": both.sum(), "level": level}
    observed |= {"least": np.maximum(kept + other - entries, 0).sum(), "most": np.minimum(kept, other).sum()}
    moments = np.array([margin_moments(chances[name], other_chances[name]) for name in first])
    margins = _beyond(*moments.sum(axis=0), **observed)
    pooled = _beyond(*_hypergeometric(entries.sum(), kept.sum(), other.sum()), **observed)
    smaller = min(kept.sum(), other.sum())
    return {
        **_beyond(*_hypergeometric(entries, kept, other), **observed),
        **{f"margin_{name}": value for name, value in margins.items() if name != "jaccard"},
        "shared": float(both.sum() / smaller) if smaller else math.nan,
        "naive": pooled["corrected"],
    }


def _hypergeometric(entries: Any, kept: Any, other: Any) -> tuple[float, float]:
    """Mean and variance of the number of entries that even masks share, summed over tensors."""
    variance = kept * other * (entries - kept) * (entries - other) / (entries**2 * np.maximum(entries - 1, 1))
    return float(np.sum(kept * other / entries)), float(np.sum(variance))


def _beyond(
    mean: float, variance: float, *, total: float, both: float, least: float, most: float, level: float
) -> dict[str, float]:
    """The overlap of `both` shared entries, compared with chance.

    mean, variance: of the number of shared entries by chance. total: entries of both masks, shared ones twice. least,
    most: how many they can share at all.
    """
    deviation = math.sqrt(variance)

    def jaccard(common: float) -> float:
        return common / (total - common) if total > common else math.nan

    reach = stats.norm.ppf((1 + level) / 2) * deviation
    ends = [min(max(mean + sign * reach, least), most) for sign in (-1, 1)]
    expected = jaccard(mean) + total / (total - mean) ** 3 * variance if total > mean else math.nan
    free = deviation > 0 and expected < 1

    def correct(value: float) -> float:
        return (value - expected) / (1 - expected) if free else math.nan

    return {
        "jaccard": jaccard(both),
        "expected": expected,
        "corrected": correct(jaccard(both)),
        "low": correct(jaccard(ends[0])),
        "high": correct(jaccard(ends[1])),
        "p": float(stats.norm.sf((both - 0.5 - mean) / deviation)) if free else math.nan,
    }


def overlap_table(runs: list[MaskRun], *, level: float = 0.95) -> pd.DataFrame:
    """`overlap` of every two masks over the same tensors at the same sparsity; controls are left out.

    Columns: key_a, key_b, and task, scorer and init_seed of each side; adapter, sparsity; `same_task`, `same_scorer`,
    `same_init`; and all that `overlap` returns.

    Simulated: as `overlap`, pair by pair; pairs share masks, so a share of pairs has no test. `pytest
    tests/studies/test_margins.py`.
    """
    rows = []
    pruned = [(run, _chances(run.kept)) for run in runs if run.control == NO_CONTROL]
    for (a, of_a), (b, of_b) in itertools.combinations(pruned, 2):
        if (a.adapter, a.sparsity) != (b.adapter, b.sparsity):
            continue
        sides = {
            f"{name}_{side}": getattr(run, name)
            for name in ("key", "task", "scorer", "init_seed")
            for side, run in (("a", a), ("b", b))
        }
        same = {
            "same_task": a.task == b.task,
            "same_scorer": a.scorer == b.scorer,
            "same_init": a.init_seed == b.init_seed,
        }
        fixed = {"adapter": a.adapter, "sparsity": a.sparsity}
        rows.append({**sides, **fixed, **same, **_overlap(a.kept, b.kept, of_a, of_b, level)})
    if not rows:
        raise DataError(
            "no two masks over the same tensors and of the same sparsity; there is nothing to compare"
        )
    return pd.DataFrame(rows)


def overlap_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Overlap in four cells, the same or another initialisation × the same or another task; one scorer at a time.

    Runs of one seed share the initial weights whatever their task, so a mask that depends on weights (magnitude wholly,
    SNIP and GraSP in part) is alike across tasks for that reason alone. Overlap across tasks says something about tasks
    only when compared with the other cells: the same task from another initialisation, and another task from another.

    `table` is `overlap_table`. Columns: adapter, scorer, sparsity, same_init, same_task, `pairs`, mean `corrected`,
    `least`, `most`, mean `naive` and `above`, the share of pairs above the interval of chance (2.5 % by chance); the
    same under the null of margins: `margin_corrected`, `margin_least`, `margin_most`, `margin_above`. All four cells
    are listed, those without pairs with 0 and NaN. (The same initialisation and task: masks that differ only in their
    data seed.) Pairs share masks, so these ranges over pairs are no intervals for other seeds or tasks.
    """
    groups = table[table["same_scorer"]].groupby(["adapter", "scorer_a", "sparsity"], sort=False)
    rows = []
    for names, part in groups:
        named = dict(zip(("adapter", "scorer", "sparsity"), names, strict=True))
        for init, task in itertools.product((True, False), repeat=2):
            cell = part[(part["same_init"] == init) & (part["same_task"] == task)]
            values = {"pairs": len(cell), "naive": cell["naive"].mean()}
            for null in ("", "margin_"):
                corrected = cell[f"{null}corrected"]
                values |= {
                    f"{null}corrected": corrected.mean(),
                    f"{null}least": corrected.min(),
                    f"{null}most": corrected.max(),
                    f"{null}above": (corrected > cell[f"{null}high"]).mean(),
                }
            rows.append({**named, "same_init": init, "same_task": task, **values})
    return pd.DataFrame(rows)


def dead_units(runs: list[MaskRun], *, level: float = 0.95) -> pd.DataFrame:
    """Bottleneck units whose inputs, or whose outputs, are all removed, so that they have no effect on the model.

    One row per run and bottleneck (tensors `down.weight` [units, width] and `up.weight` [width, units]; in LoRA `A` and
    `B`): key, task, scorer, …, layer, site, `units`, `dead`, `expected` by chance and `low`, `high` (`level`; normal,
    or binomial where fewer than 1.5 are expected).
    Null: masks drawn evenly within each tensor, with as many entries as are kept there. A unit of `width` inputs loses
    them all with probability C(N − width, k)/C(N, k); two units at once likewise, which gives the variance.
    Generalises to: nothing beyond this mask, given how many entries its tensors keep.

    Simulated: even masks have more dead units than `high` in 0.04 at most, whether 0.2 or 3.6 are expected.
    `pytest tests/studies/test_mask_statistics.py -k dead`.
    """
    check_range("level", level, above=0, below=1)
    reach = stats.norm.ppf((1 + level) / 2)
    rows = []
    for run in runs:
        for name, inputs in run.kept.items():
            for into, out in UNITS:
                outputs = run.kept.get(f"{name[: -len(into)]}{out}") if name.endswith(f".{into}") else None
                if outputs is None or inputs.ndim != 2 or outputs.ndim != 2:
                    continue
                dead = ~inputs.any(axis=1) | ~outputs.any(axis=0)
                mean, deviation = _chance_of_death(inputs, outputs)
                if mean < FEW:
                    low, high = map(float, stats.binom.interval(level, len(inputs), mean / len(inputs)))
                else:
                    low, high = np.clip([mean - reach * deviation, mean + reach * deviation], 0, len(inputs))
                row = {
                    **run.facts,
                    "layer": run.places.loc[name, "layer"],
                    "site": run.places.loc[name, "site"],
                }
                counts = {"units": len(inputs), "dead": int(dead.sum()), "expected": mean}
                rows.append({**row, **counts, "low": low, "high": high})
    columns = ["key", *FACTS, "layer", "site", "units", "dead", "expected", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _chance_of_death(inputs: np.ndarray, outputs: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the number of dead units under even masks."""
    units = len(inputs)
    one, two = (
        [_none_kept(mask.size, int(mask.sum()), many * mask.size // units) for mask in (inputs, outputs)]
        for many in (1, 2)
    )
    alive = math.prod(1 - p for p in one)
    both_alive = math.prod(1 - 2 * p + pp for p, pp in zip(one, two, strict=True)) if units > 1 else alive
    dead, both_dead = 1 - alive, 1 - 2 * alive + both_alive
    variance = units * dead * (1 - dead) + units * (units - 1) * (both_dead - dead**2)
    return units * dead, math.sqrt(max(variance, 0.0))


def _none_kept(entries: int, kept: int, chosen: int) -> float:
    """C(entries − chosen, kept)/C(entries, kept): the chance that none of `chosen` entries is among the `kept`."""
    if chosen > entries or kept > entries - chosen:
        return 0.0
    left, out = entries - chosen, entries - kept
    logarithm = gammaln(left + 1) - gammaln(left - kept + 1) - gammaln(entries + 1) + gammaln(out + 1)
    return float(np.exp(logarithm))
