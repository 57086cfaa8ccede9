"""The mask study as tables: which masks compare, and what the cells of their overlaps say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.studies import (
    alike_beyond,
    dead_by_scorer,
    dead_units,
    densities,
    kept_by_side,
    mask_overview,
    masks_at,
    of_own_seed,
    overlap_cells,
    overlap_grid,
    overlap_table,
)
from hadamard_toolkit.studies.mask_statistics import MaskRun
from tests.studies.test_mask_statistics import FLAT, even, run_of


def masks() -> list[MaskRun]:
    """SNIP and magnitude, two seeds on tweets and one on SST-2; another draw, width and share, and a control."""
    generator = np.random.default_rng(0)
    runs = [
        run_of(even(generator, FLAT), key=f"{scorer}{task}{seed}", scorer=scorer, task=task, init_seed=seed,
               data_seed=seed if scorer == "snip" else None)
        for scorer in ("snip", "magnitude")
        for task, seed in (("embedded/tweets-polarity", 0), ("embedded/tweets-polarity", 1), ("sst2", 0))
    ]  # fmt: skip
    task = "embedded/tweets-polarity"
    runs.append(run_of(even(generator, FLAT), key="again", task=task, init_seed=0, data_seed=7))
    runs.append(run_of(even(generator, FLAT), key="wide", adapter="Pfeiffer(bottleneck=64)", task=task))
    runs.append(run_of(even(generator, FLAT), key="shuffled", control="shuffled", task=task))
    runs.append(run_of(even(generator, FLAT), key="half", sparsity=0.4, task=task))
    return runs


def test_the_overview_counts_seeds_without_controls() -> None:
    found = mask_overview(masks())
    assert list(found.columns) == ["40% removed", "80% removed"]
    assert found.loc[("Pfeiffer()", "tweets-polarity", "snip")].tolist() == [1, 2]
    assert found.loc[("Pfeiffer()", "sst2", "magnitude")].tolist() == [0, 1]
    assert found.loc[("Pfeiffer(bottleneck=64)", "tweets-polarity", "snip")].tolist() == [0, 1]


def test_masks_of_one_sparsity_and_of_the_commonest_adapter_compare() -> None:
    chosen = masks_at(masks(), 0.8)
    assert {run.key for run in masks()} - {run.key for run in chosen} == {"wide", "shuffled", "half"}
    assert {run.key for run in chosen} - {run.key for run in of_own_seed(chosen)} == {"again"}
    with pytest.raises(DataError, match=r"sparsity=0.5; there are \[0.4, 0.8\]"):
        masks_at(masks(), 0.5)


def test_densities_have_a_panel_per_task_and_a_share_per_side() -> None:
    chosen = of_own_seed(masks_at(masks(), 0.8))
    found = densities(chosen)
    assert set(found["adapter"]) == {"tweets-polarity", "sst2"}
    assert set(found["seed"]) == {0, 1}
    assert found["density"].tolist() == pytest.approx([0.2] * len(found))
    up = even(np.random.default_rng(1), {name: 0.3 if ".up." in name else 0.1 for name in FLAT})
    sides = kept_by_side([run_of(up), run_of(up, scorer="random")])
    assert list(sides.columns) == ["down", "up"]
    assert sides.loc["snip"].tolist() == pytest.approx([0.1, 0.3])


def test_cells_are_laid_out_by_initialisation_and_task_with_their_pairs() -> None:
    cells = overlap_cells(overlap_table(masks_at(masks(), 0.8)))
    grid = overlap_grid(cells)
    assert list(grid.columns) == [
        ("same init", "same task"),
        ("same init", "other task"),
        ("other init", "same task"),
        ("other init", "other task"),
    ]
    assert list(grid.columns.names) == ["init", "task"]
    assert grid.loc["magnitude", ("same init", "same task")] == "no pairs"
    row = cells.query("scorer == 'snip' and same_init and same_task").iloc[0]
    assert grid.loc["snip", ("same init", "same task")] == f"{row['corrected']:+.3f} (1)"
    margins = overlap_grid(cells, "margin_corrected")
    assert margins.loc["snip", ("same init", "same task")] == f"{row['margin_corrected']:+.3f} (1)"


def test_shares_of_pairs_alike_beyond_chance_weigh_every_pair_once() -> None:
    cells = pd.DataFrame(
        [(True, 5, 1.0, 1.0), (False, 3, 1.0, 0.0), (False, 1, 0.0, 1.0), (False, 0, np.nan, np.nan)],
        columns=["same_init", "pairs", "above", "margin_above"],
    )
    assert alike_beyond(cells) == {"pairs": 4, "densities": 0.75, "margins": 0.25}


def test_dead_units_are_added_up_by_run_and_averaged_over_runs() -> None:
    generator = np.random.default_rng(2)
    runs = [run_of(even(generator, dict.fromkeys(FLAT, 0.03)), key=str(seed)) for seed in range(2)]
    dead = dead_units(runs)
    found = dead_by_scorer(runs).loc["snip"]
    assert found["units"] == 3 * 8
    assert found["dead"] == dead["dead"].sum() / 2
    assert found["expected"] == pytest.approx(dead["expected"].sum() / 2)
    assert found["above"] == (dead["dead"] > dead["high"]).mean()
