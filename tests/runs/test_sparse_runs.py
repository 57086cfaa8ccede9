"""Sparsity as a field of a run: canonical, applied before training, recorded, restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.sparsity.spec import Sparsity
from tests.sparsity.tiny import pruned

MakeSpec = Callable[..., RunSpec]
ADAPTER = ht.Pfeiffer(bottleneck=4, init="normal", activation="gelu")
SNIP = Sparsity("snip", 0.6, examples=16, batch_size=8)


def test_a_spec_has_one_spelling_of_its_sparsity(make_spec: MakeSpec) -> None:
    spec = make_spec(sparsity=SNIP)
    same = make_spec(sparsity={"scorer": "snip", "sparsity": 0.6, "examples": 16, "batch_size": 8})
    assert spec == same
    assert spec.key == same.key != make_spec(sparsity=Sparsity("snip", 0.5, examples=16, batch_size=8)).key
    again = RunSpec.from_dict(json.loads(spec.to_json()))
    assert again.sparsity == SNIP
    named = make_spec(sparsity=Sparsity("random", 0, maskable=["norms", "vectors"]))  # type: ignore[arg-type]
    assert RunSpec.from_dict(named.to_dict()).sparsity == Sparsity(
        "random", 0.0, maskable=("norms", "vectors")
    )


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        *((name, 1, 0) for name in ("rounds", "examples", "batch_size", "every")),
        *((name, 0, -1) for name in ("warmup_steps", "seed", "data_seed")),
        ("sparsity", 0, -0.01),
        ("sparsity", 0.99, 1),
        ("begin", 0, -0.01),
        ("end", 1, 1.01),
    ],
)
def test_fields_at_their_bounds(name: str, allowed: float, refused: float) -> None:
    assert getattr(Sparsity(**{"scorer": "snip", "sparsity": 0.5, name: allowed}), name) == allowed
    with pytest.raises(ArgumentError, match=f"{name}={refused}"):
        Sparsity(**{"scorer": "snip", "sparsity": 0.5, name: refused})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "snap"}, "scorer='snap'"),
        ({"sparsity": 1}, "sparsity=1 is not allowed"),
        ({"rounds": 1.5}, "rounds=1.5"),
        ({"examples": 0}, "examples=0"),
        ({"data_seed": -1}, "data_seed=-1"),
        ({"when": "later"}, "when='later'"),
        ({"control": "dense"}, "control='dense'"),
        ({"when": "gradual"}, "scorer='snip' is not allowed with when='gradual'"),
        (
            {"when": "gradual", "scorer": "magnitude", "rounds": 2},
            "rounds=2 is not allowed with when='gradual'",
        ),
        (
            {"when": "gradual", "scorer": "magnitude", "warmup_steps": 5},
            "warmup_steps=5 is not allowed with when='gradual'",
        ),
        (
            {"when": "gradual", "scorer": "magnitude", "control": "random"},
            "control='random' is not allowed with when='gradual'",
        ),
        ({"begin": 0.8}, "end=0.7 is not allowed"),
    ],
)
def test_bad_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sparsity(**{"scorer": "snip", "sparsity": 0.5, **changes})
    with pytest.raises(ArgumentError, match="field of Sparsity='share'"):
        Sparsity.from_dict({"scorer": "snip", "share": 0.5})
    with pytest.raises(ArgumentError, match="needs the field 'sparsity'"):
        Sparsity.from_dict({"scorer": "snip"})


@pytest.mark.filterwarnings("ignore:nothing stays")
def test_a_sparse_run_is_recorded_and_comes_back(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(adapter=ADAPTER, sparsity=SNIP, seed=2)
    done = run(spec, tmp_path / "runs")
    assert done.attachment is not None
    masks = ht.Masks.of(done.attachment)
    entries = 3 * 2 * 4 * 16
    assert masks.removed == round(0.6 * entries)
    assert not pruned(done.attachment, masks).any()
    record = json.loads((tmp_path / "runs" / spec.key / "run.json").read_text())
    made = record["train_info"]["sparsity"]
    assert (made["scorer"], made["init_seed"], made["seed"], made["data_seed"]) == ("snip", 2, 2, 2)
    assert (made["examples"], made["batches"], made["kept"]) == (16, 2, entries - masks.removed)
    assert len(made["sha256"]) == 64
    assert record["times"]["sparsify"] > 0
    assert done.counts.loc["adapter", "nonzero"] == record["counts"]["adapter"]["stored"]

    store = RunStore(tmp_path / "runs")
    stored = store.masks(spec.key)
    assert all(torch.equal(mask, masks.kept[name]) for name, mask in stored.kept.items())
    assert stored.provenance == json.loads(json.dumps(masks.provenance))
    *_, restored = store.run(spec.key).restore()
    assert not pruned(restored, stored).any()
    assert all(torch.equal(v, done.attachment.state_dict()[k]) for k, v in restored.state_dict().items())
    table = store.load()
    assert json.loads(table["sparsity"].iloc[0])["scorer"] == "snip"
    dense = run(make_spec(), tmp_path / "runs")
    with pytest.raises(ArgumentError, match="holds no masks"):
        store.masks(dense.key)


@pytest.mark.filterwarnings("ignore:nothing stays")
def test_seeds_of_weights_and_data_are_free_of_each_other(make_spec: MakeSpec) -> None:
    def masks(seed: int, data_seed: int | None = None) -> ht.Masks:
        sparsity = Sparsity("snip", 0.6, examples=16, batch_size=8, data_seed=data_seed)
        attachment = run(make_spec(adapter=ADAPTER, sparsity=sparsity, seed=seed)).attachment
        assert attachment is not None
        return ht.Masks.of(attachment)

    one, other_data, other_weights = masks(0), masks(0, 1), masks(1, 0)
    assert (one.init_seed, one.data_seed) == (0, 0)
    assert (other_data.init_seed, other_data.data_seed) == (0, 1)
    assert (other_weights.init_seed, other_weights.data_seed) == (1, 0)
    assert other_data.provenance["sha256"] != one.provenance["sha256"]


@pytest.mark.parametrize("control", ["shuffled", "margins", "random", "uniform", "reinitialised"])
@pytest.mark.filterwarnings("ignore:nothing stays")
def test_controls_run_like_any_other_spec(make_spec: MakeSpec, control: str, tmp_path: Path) -> None:
    plain = run(make_spec(adapter=ADAPTER, sparsity=SNIP)).attachment
    spec = make_spec(
        adapter=ADAPTER, sparsity=Sparsity("snip", 0.6, examples=16, batch_size=8, control=control)
    )
    attachment = run(spec, tmp_path / "runs").attachment
    assert plain is not None
    assert attachment is not None
    masks, own = ht.Masks.of(attachment), ht.Masks.of(plain)
    same = all(torch.equal(mask, own.kept[name]) for name, mask in masks.kept.items())
    assert same == (control == "reinitialised")
    assert (attachment.seed == plain.seed) == (control != "reinitialised")
    assert masks.provenance["control"] == control
    assert not pruned(attachment, masks).any()
    *_, restored = RunStore(tmp_path / "runs").run(spec.key).restore()
    assert all(torch.equal(v, attachment.state_dict()[k]) for k, v in restored.state_dict().items())


def test_gradual_pruning_runs_from_a_spec(make_spec: MakeSpec, tmp_path: Path) -> None:
    sparsity = Sparsity("magnitude", 0.5, when="gradual", every=1)
    spec = make_spec(adapter=ht.LoRA(rank=4), sparsity=sparsity)
    attachment = run(spec, tmp_path / "runs").attachment
    assert attachment is not None
    masks = ht.Masks.of(attachment)
    assert masks.removed == masks.entries // 2
    assert not pruned(attachment, masks).any()
    assert RunStore(tmp_path / "runs").masks(spec.key).provenance["when"] == "gradual"


def test_more_examples_than_training_rows_is_a_recorded_failure(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="examples=320 is not allowed; there are 48"):
        run(make_spec(adapter=ADAPTER, sparsity=Sparsity("snip", 0.5)), tmp_path)
    assert len(RunStore(tmp_path).failed()) == 1


def test_the_large_sparse_comparison_is_a_plan_of_equal_budgets(make_spec: MakeSpec) -> None:
    given = make_spec()
    protocol, slow = given.protocol, ht.Protocol(learning_rate=1e-5)
    adapter = ht.Houlsby(init="normal")
    specs = ht.large_sparse_plan(
        768, adapter, backbone=given.backbone, task=["sst2", "rte"], protocol=protocol, sparsity=SNIP,
        full_protocol=slow, seeds=range(2),
    )  # fmt: skip
    shares = [0.0, 0.5, 0.75, 0.875]
    rows = [(s.adapter, s.sparsity.sparsity if s.sparsity else 0.0, s.protocol) for s in specs[:10:2]]
    sparse = [
        (ht.Houlsby(bottleneck=4 * 2**i, init="normal"), share, protocol) for i, share in enumerate(shares)
    ]
    assert rows == [*sparse, (ht.FullFineTuning(), 0.0, slow)]
    assert [(spec.task, spec.seed) for spec in specs] == [
        (t, s) for t in ("sst2", "rte") for _ in rows for s in (0, 1)
    ]
    assert all(spec.sparsity is None or spec.sparsity.examples == SNIP.examples for spec in specs)
