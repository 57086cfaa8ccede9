"""The controls keep exactly what they promise to keep, and change the rest."""

from __future__ import annotations

import itertools

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sparsity.budgets import dense_adapter
from hadamard_toolkit.sparsity.controls import control
from tests.architectures import tiny_config, tiny_model
from tests.sparsity.tiny import ADAPTERS, attached, batches, pruned


def flat(masks: ht.Masks) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in masks.kept.values()])


def made(adapter: Adapter | None = None) -> ht.Masks:
    return ht.sparsify(attached(adapter, seed=3), scorer="snip", sparsity=0.6, batches=batches())


def test_what_each_control_keeps_and_changes() -> None:
    masks = made()
    found = ht.controls(masks, seed=1)
    assert list(found) == ["shuffled", "margins", "random", "uniform", "reinitialised", "dense"]
    densities = masks.table()["density"]
    for name in ("shuffled", "margins", "random"):
        assert found[name].table()["density"].equals(densities), "tensor by tensor"
        assert not torch.equal(flat(found[name]), flat(masks))
        assert found[name].init_seed == masks.init_seed
    assert not torch.equal(flat(found["shuffled"]), flat(found["random"]))
    uniform = found["uniform"].table()
    assert (uniform["kept"] - 0.4 * uniform["entries"]).abs().max() < 1
    assert found["uniform"].removed == masks.removed
    assert densities.std() > 0.05 > uniform["density"].std()
    assert torch.equal(flat(found["reinitialised"]), flat(masks))
    assert found["reinitialised"].init_seed != masks.init_seed
    for name in ("shuffled", "margins", "random", "uniform", "reinitialised"):
        assert (found[name].provenance["control"], found[name].provenance["control_seed"]) == (name, 1)
    assert torch.equal(flat(masks), flat(ht.Masks.of(masks.attachment))), "the masks stay at work"


def drawn_mask(*shape: int) -> torch.Tensor:
    """Rows and columns that are kept more and less often."""
    noise = torch.Generator().manual_seed(4)
    rows, columns = (
        torch.randn(shape[0], 1, generator=noise),
        torch.randn(shape[1:], generator=noise).flatten(),
    )
    favour = (rows + columns - 1).sigmoid()
    return (torch.rand(favour.shape, generator=noise) < favour).reshape(shape)


def test_within_its_margins_a_mask_keeps_its_rows_and_columns_and_no_single_weight() -> None:
    kept = {
        "tall": drawn_mask(60, 12),
        "wide": drawn_mask(12, 60),
        "deep": drawn_mask(6, 8, 5),
        "vector": drawn_mask(1, 50)[0],
        "row": drawn_mask(1, 20),
        "none": torch.zeros(4, 5, dtype=torch.bool),
    }
    masks = ht.Masks(kept, dict.fromkeys(kept), {"init_seed": 0})  # type: ignore[arg-type]
    others = [control(masks, "margins", seed).kept for seed in range(200)]
    for name, mask in kept.items():
        for other in others[:10]:
            assert other[name].dtype == torch.bool
            assert other[name].sum() == mask.sum()
            if mask.ndim > 1:
                assert torch.equal(other[name].flatten(1).sum(0), mask.flatten(1).sum(0)), name
                assert torch.equal(other[name].flatten(1).sum(1), mask.flatten(1).sum(1)), name
    for name in ("tall", "wide", "deep", "vector"):
        shared = torch.stack([(other[name] & kept[name]).sum() for other in others]).float()
        apart = torch.stack([(a[name] & b[name]).sum() for a, b in itertools.pairwise(others)]).float()
        assert shared.mean() < 0.9 * kept[name].sum(), "its own pattern is gone:"
        assert abs(shared.mean() - apart.mean()) < 4 * (shared.std() + apart.std()) / 200**0.5, (
            "no more alike to the mask than the shuffled ones are to each other"
        )
    for name in ("row", "none"):  # the margins leave no choice
        assert torch.equal(others[0][name], kept[name])


def test_of_all_masks_with_the_same_margins_each_is_as_likely() -> None:
    """Six masks of three rows and columns have two entries in each."""
    kept = {"w": ~torch.eye(3, dtype=torch.bool)}
    masks = ht.Masks(kept, dict.fromkeys(kept), {"init_seed": 0})  # type: ignore[arg-type]
    seen = [tuple(control(masks, "margins", seed).kept["w"].flatten().tolist()) for seed in range(600)]
    counts = torch.tensor([seen.count(one) for one in set(seen)]).float()
    assert len(counts) == 6
    assert (
        (counts - 100) ** 2 / 100
    ).sum() < 15.1  # the 99 % quantile of chi-squared with 5 degrees of freedom


def test_controls_are_seeded() -> None:
    masks = made()
    for name in ("shuffled", "margins", "random", "uniform"):
        assert torch.equal(flat(control(masks, name, 1)), flat(control(masks, name, 1)))
        assert not torch.equal(flat(control(masks, name, 1)), flat(control(masks, name, 2)))
    assert control(masks, "reinitialised", 1).init_seed != control(masks, "reinitialised", 2).init_seed


def test_each_control_draws_its_own_noise() -> None:
    # of a vector without rows both are permutations
    masks = ht.sparsify(attached(ht.Hadamard(norm=None)), scorer="random", sparsity=0.5, maskable="vectors")
    shuffled, margins = (flat(control(masks, name, seed=1)) for name in ("shuffled", "margins"))
    assert shuffled.sum() == margins.sum() == flat(masks).sum()
    assert not torch.equal(shuffled, margins)


def test_a_control_attaches_with_its_own_weights() -> None:
    masks = made()
    again = control(masks, "reinitialised").attach(tiny_model("bert"))
    assert not pruned(again, masks).any()
    kept = {name: again.state_dict()[name][mask] for name, mask in masks.kept.items()}
    here = {name: masks.attachment.state_dict()[name][mask] for name, mask in masks.kept.items()}
    assert not any(torch.equal(kept[name], here[name]) for name in kept if len(here[name]))
    shuffled = control(masks, "shuffled")
    placed = shuffled.apply(attached(seed=3))
    placed.remove()
    assert all(
        torch.equal(v, attached(seed=3).state_dict()[k]) for k, v in placed.attachment.state_dict().items()
    )


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (ht.Houlsby(bottleneck=10, init="normal"), ht.Houlsby(bottleneck=4, init="normal")),
        (ht.LoRA(rank=5, init="normal"), ht.LoRA(rank=2, init="normal")),
        (ht.MAM(length=2, bottleneck=5, init="normal"), ht.MAM(length=2, bottleneck=2, init="normal")),
        (  # widths in proportion; the network of the prefixes has none of the weights
            ht.Stack(ht.PrefixTuning(2, bottleneck=7), ht.Pfeiffer(bottleneck=10), ht.LoRA(rank=5)),
            ht.Stack(ht.PrefixTuning(2, bottleneck=7), ht.Pfeiffer(bottleneck=4), ht.LoRA(rank=2)),
        ),
        (ht.UniPELT(bottleneck=10, rank=5), ht.UniPELT(bottleneck=4, rank=2)),
    ],
)
def test_the_small_dense_adapter_has_as_many_weights(adapter: Adapter, expected: Adapter) -> None:
    masks = ht.sparsify(attached(adapter), scorer="random", sparsity=0.6)
    found = ht.controls(masks)["dense"]
    assert found == expected
    twin = ht.sparsify(attached(found), scorer="random", sparsity=0)
    assert twin.entries == masks.entries - masks.removed


def test_the_dense_adapter_is_the_nearest_and_at_least_of_width_one() -> None:
    config = tiny_config("bert")  # 3 layers x 2 sites x 2 x 16 = 192 per unit
    for kept, width in ((1, 1), (192, 1), (287, 1), (289, 2), (192 * 7 + 90, 7), (192 * 64, 64)):
        assert dense_adapter(ht.Houlsby(bottleneck=64), config, kept) == ht.Houlsby(bottleneck=width)


def test_a_fusion_has_no_smaller_self_and_loose_masks_no_sizes() -> None:
    masks = made(ADAPTERS["fusion"])
    assert "dense" not in ht.controls(masks)
    loose = control(masks, "shuffled")
    with pytest.raises(ArgumentError, match="on no attachment"):
        ht.controls(loose)
    with pytest.raises(ArgumentError, match="control='other'"):
        control(masks, "other")


def test_what_a_seed_draws_never_changes() -> None:
    """Controls that were trained with an earlier version are drawn again as they were."""
    masks = made()
    some = ht.Masks({"a": torch.arange(12).reshape(3, 4) % 3 == 0}, masks.places, masks.provenance)
    drawn = {
        name: control(some, name, 1).kept["a"].int().flatten().tolist()
        for name in ("shuffled", "margins", "random")
    }
    assert drawn == {
        "shuffled": [0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0],
        "margins": [0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0],
        "random": [0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0],
    }
    assert control(masks, "reinitialised", 1).init_seed == 1579477807
