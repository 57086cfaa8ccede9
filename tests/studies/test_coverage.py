"""What there is: runs of plans are done, refused or missing; figures are those of the reference profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hadamard_toolkit as ht
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.studies import figure_list, plan_coverage


def test_planned_runs_are_done_refused_or_missing(
    make_spec: Callable[..., ht.RunSpec], tmp_path: Path
) -> None:
    store = ht.RunStore(tmp_path / "store")
    done, refused = make_spec(), make_spec(seed=1)
    missing = [make_spec(adapter=ht.LoRA(), seed=seed) for seed in (0, 1)]
    missing.append(make_spec(adapter=ht.HeadOnly()))
    ht.sweep([done], store)
    store.add_failure(refused, UnsupportedError("on purpose"))
    found = plan_coverage(store, {"all": [done, refused, *missing], "first": iter([done])})
    assert found.loc["all"].tolist() == [5, 1, 1, 3, "HeadOnly 1, LoRA 2"]
    assert found.loc["first"].tolist() == [1, 1, 0, 0, "none"]


def test_figures_of_smoke_runs_are_not_listed(tmp_path: Path) -> None:
    for name, profile in (("second", "reference"), ("first", "reference"), ("trial", "smoke")):
        record = {"figure": name, "profile": profile, "caption": f"The {name}", "table": {"rows": len(name)}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = figure_list(tmp_path)
    assert found.index.tolist() == ["first", "second"]
    assert found.loc["second"].tolist() == [6, "The second"]
