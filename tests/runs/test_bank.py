from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.runs import bank as module
from hadamard_toolkit.runs import engines
from hadamard_toolkit.runs.bank import Bank, banks, run_bank, runs_in_memory
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.runs.sweep import sweep
from hadamard_toolkit.training.pretraining_step import ContinuedPretraining
from tests.runs.conftest import PROTOCOL

MakeSpec = Callable[..., RunSpec]
BROKEN = ht.Hadamard(layers=(9,))  # the tiny backbone has three layers
HADAMARD, FULL = ht.Hadamard(), ht.FullFineTuning()
SMALL = replace(PROTOCOL, batch_size=8)


def test_a_swept_bank_leaves_a_record_per_run(make_spec: MakeSpec, tmp_path: Path) -> None:
    protocols = [PROTOCOL, replace(PROTOCOL, learning_rate=1e-3, epochs=2)]
    specs = [make_spec(seed=seed, protocol=protocol) for seed in (0, 1) for protocol in protocols]
    table = sweep(specs, tmp_path / "banked", bank=8)
    assert table["status"].tolist() == ["done"] * 4
    store = RunStore(tmp_path / "banked")
    for spec in specs:
        banked, single = store.run(spec.key), run(spec)
        assert banked.spec == spec
        assert banked.info["train_info"]["bank"] == 4
        assert "bank" not in single.info["train_info"]
        assert banked.info["rows"] == single.info["rows"]
        assert banked.counts.equals(single.counts)
        assert banked.times.keys() == single.times.keys()
        assert list(banked.history.columns) == list(single.history.columns)
        assert len(banked.history) == len(single.history)
        for name, arrays in single.predictions.items():
            assert np.array_equal(banked.predictions[name]["rows"], arrays["rows"])
        for name, part in ("train_info", "selected"), ("meta_info", "task"), ("meta_info", "backbone"):
            assert banked.info[name][part].keys() == single.info[name][part].keys()
        assert banked.restore()[2].adapter == spec.adapter


def test_the_head_of_a_bank_is_that_of_the_run_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Stage one on features has the head's dropout only, so both train the same head but for what is dropped."""
    specs = [make_spec(seed=seed, adapter=ht.HeadOnly()) for seed in (0, 1)]
    for spec, banked in zip(specs, run_bank(specs), strict=True):
        assert not isinstance(banked, Exception)
        assert banked.attachment is not None
        assert banked.history["loss"].tolist() == pytest.approx(run(spec).history["loss"].tolist(), rel=0.1)


def test_runs_that_fit_share_a_bank_and_no_others(make_spec: MakeSpec) -> None:
    hadamard = [make_spec(seed=seed) for seed in range(3)]
    other_rate = make_spec(protocol=replace(PROTOCOL, learning_rate=1e-3))
    lora = [make_spec(seed=seed, adapter=ht.LoRA()) for seed in range(2)]
    other_batch = make_spec(protocol=SMALL)
    plan = [hadamard[0], lora[0], hadamard[1], other_batch, other_rate, hadamard[2], lora[1]]
    assert [bank.specs for bank in banks(plan, 3)] == [
        (hadamard[0], hadamard[1], other_rate),
        (hadamard[2],),
        (lora[0], lora[1]),
        (other_batch,),
    ]
    assert banks(plan, 1) == [Bank((spec,)) for spec in plan]


def test_auto_banks_on_a_gpu_and_keeps_the_bytes_of_single_runs_on_a_processor(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (1e-3, 5e-3)
    plan = [
        make_spec(seed=seed, protocol=replace(protocol, learning_rate=rate))
        for protocol in (PROTOCOL, SMALL)
        for seed in (0, 1)
        for rate in rates
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert banks(plan, "auto") == [Bank((spec,)) for spec in plan]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    assert [len(bank.specs) for bank in banks(plan, "auto")] == [4, 4]


@pytest.mark.parametrize("bank", [0, -1, "all", 1.5, True])
def test_bad_sizes_are_refused(make_spec: MakeSpec, tmp_path: Path, bank: Any) -> None:
    with pytest.raises(ArgumentError, match="bank="):
        sweep([make_spec()], tmp_path, bank=bank)


def test_what_cannot_be_in_a_bank_says_so_in_its_record(make_spec: MakeSpec, tmp_path: Path) -> None:
    gradual = ht.Sparsity(scorer="magnitude", sparsity=0.5, when="gradual")
    alone = make_spec(adapter=ht.Pfeiffer(bottleneck=4, init="normal"), sparsity=gradual)
    gated = [make_spec(seed=seed, adapter=ht.Pfeiffer(bottleneck=4, gated="original")) for seed in (0, 1)]
    cached = make_spec(protocol=replace(PROTOCOL, frozen_prefix="cached"))
    assert sweep([alone, *gated, cached], tmp_path, bank=4)["status"].tolist() == ["done"] * 4
    store = RunStore(tmp_path)
    assert "masks change" in store.run(alone.key).info["train_info"]["bank_refused"]
    assert "frozen prefix" in store.run(cached.key).info["train_info"]["bank_refused"]
    for spec in gated:
        assert "padding" in store.run(spec.key).info["train_info"]["bank_refused"]


def test_sparse_runs_bank(make_spec: MakeSpec, tmp_path: Path) -> None:
    sparse = ht.Sparsity(scorer="snip", sparsity=0.5, examples=32)
    specs = [
        make_spec(seed=seed, adapter=ht.Pfeiffer(bottleneck=4, init="normal"), sparsity=sparse)
        for seed in (0, 1)
    ]
    assert sweep(specs, tmp_path, bank=2)["status"].tolist() == ["done", "done"]
    for spec in specs:
        banked, single = RunStore(tmp_path).masks(spec.key), run(spec).attachment
        assert single is not None
        assert single.masking is not None
        for name, kept in single.masking.kept.items():
            assert torch.equal(banked.kept[name], kept)
        assert RunStore(tmp_path).run(spec.key).info["train_info"]["bank"] == 2


def test_a_run_that_fails_in_a_bank_fails_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    wild = replace(PROTOCOL, learning_rate=1e38, clip=None)
    specs = [make_spec(seed=0), make_spec(seed=1, protocol=wild), make_spec(seed=2)]
    table = sweep(specs, tmp_path, bank=3)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert "the loss became" in table["reason"][1]
    assert RunStore(tmp_path).failed()["key"].tolist() == [specs[1].key]
    broken = [make_spec(seed=seed, adapter=BROKEN) for seed in (0, 1)]
    assert sweep(broken, tmp_path, bank=2)["status"].tolist() == ["failed", "failed"]


def test_runs_in_other_hands_are_left_out_of_the_bank(make_spec: MakeSpec, tmp_path: Path) -> None:
    store, specs = RunStore(tmp_path), [make_spec(seed=seed) for seed in range(3)]
    with store.claim(specs[1]):
        table = sweep(specs, RunStore(tmp_path), bank=3)
    assert table["status"].tolist() == ["done", "elsewhere", "done"]
    assert store.run(specs[0].key).info["train_info"]["bank"] == 2


def test_a_bank_that_does_not_fit_the_memory_is_halved(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def short_of_memory(specs: Any) -> Any:
        tried.append(len(specs))
        if len(specs) > 2:
            raise torch.OutOfMemoryError("no room")
        return run_bank(specs)

    monkeypatch.setattr(engines, "run_bank", short_of_memory)
    monkeypatch.setattr(engines, "_fitting", {})
    specs = [make_spec(seed=seed, adapter=ht.HeadOnly()) for seed in range(4)]
    assert sweep(specs, tmp_path, bank=4)["status"].tolist() == ["done"] * 4
    assert tried == [4, 2, 2]
    more = [replace(spec, seed=spec.seed + 4) for spec in specs]
    others = [make_spec(seed=seed) for seed in range(3)]
    assert sweep([*more, *others], tmp_path, bank=4)["status"].tolist() == ["done"] * 7
    assert tried[3:] == [2, 2, 3], (
        "what was too large once is not tried again, and other runs are another matter"
    )


@pytest.mark.parametrize(
    ("trained", "gigabytes", "runs"),
    [
        (0, 1, 64),
        (5_000, 16, 64),
        (300_000, 16, 64),
        (110_000_000, 80, 12),
        (110_000_000, 16, 2),
        (350_000_000, 16, 1),
    ],
)
def test_the_memory_bounds_a_bank(trained: int, gigabytes: int, runs: int) -> None:
    assert runs_in_memory(trained, gigabytes * 2**30) == runs
    assert runs == 1 or runs * trained * module.BYTES_PER_PARAMETER <= gigabytes * 2**30 / 2


def test_automatic_banks_are_as_large_as_the_free_memory_allows(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = sum(p.numel() for p in ht.load_backbone(make_spec().backbone)[0].base_model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 5 * 32 * whole, 0))
    plan = [make_spec(seed=seed, adapter=adapter) for adapter in (HADAMARD, FULL) for seed in range(12)]
    assert [len(bank.specs) for bank in banks(plan, "auto")] == [12, 5, 5, 2]
    assert [len(bank.specs) for bank in banks(plan, 12)] == [12, 12], "a number is kept to"
    unknown = [make_spec(seed=seed, backbone="nobody/nothing") for seed in range(3)]
    assert [len(bank.specs) for bank in banks(unknown, "auto")] == [3]


def test_models_of_a_bank_share_their_frozen_weights(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hadamard_toolkit.training import bank as training

    def look(members: Any, **_: Any) -> Any:
        first, second = (dict(member.attachment.model.named_parameters()) for member in members)
        own = {name for name in first if first[name] is not second[name]}
        assert own == {
            name for name, p in first.items() if any(p is q for q in members[0].attachment.parameters())
        }
        raise UnsupportedError("seen")

    monkeypatch.setattr(training, "train_bank", look)
    with pytest.raises(UnsupportedError, match="seen"):
        run_bank([make_spec(seed=seed) for seed in (0, 1)])
    assert module.SHARED


def test_a_run_that_cannot_be_in_a_bank_is_known_from_its_spec(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def protocol(**changes: Any) -> RunSpec:
        return make_spec(protocol=replace(PROTOCOL, **changes))

    assert module.refusal(make_spec()) == ""
    assert (
        module.refusal(protocol(pretraining=(ContinuedPretraining(),))) == "its backbone is pretrained for it"
    )
    gradual = ht.Sparsity(scorer="magnitude", sparsity=0.5, when="gradual")
    assert module.refusal(make_spec(sparsity=gradual)) == "its masks change while it trains"
    assert module.refusal(make_spec(sparsity=ht.Sparsity("magnitude", 0.5))) == ""
    assert module.refusal(make_spec(adapter=ht.AdapterFusion(("sst2", "cola")))) == "it is made of other runs"
    assert module.refusal(make_spec(adapter=ht.AdapterFusion(("sst2", "SST-2")))).startswith(
        "ArgumentError: tasks="
    )
    monkeypatch.setattr(module, "_about", lambda task: ("span", 2, "span"))
    assert module.refusal(make_spec()) == "a bank trains classification and regression, not spans"


def test_masks_that_change_are_refused_by_the_bank_itself(make_spec: MakeSpec) -> None:
    gradual = ht.Sparsity(scorer="magnitude", sparsity=0.5, when="gradual")
    spec = make_spec(adapter=ht.Pfeiffer(bottleneck=4, init="normal"), sparsity=gradual)
    with pytest.raises(UnsupportedError, match="a bank cannot change masks while it trains"):
        run_bank([spec])
