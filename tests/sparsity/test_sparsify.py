"""What `sparsify` promises: exact, reproducible, without side effects, and clear where it cannot."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.sites import Sites
from hadamard_toolkit.sparsity.scores import SCORERS
from tests.sparsity.tiny import ADAPTERS, attached, batches, pruned


class Single(SiteModule):
    """h + a, one number for all: a tensor with one parameter."""

    projections = ("shift",)

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.3]))

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        return hidden + self.shift * hidden


class SingleAdapter(Adapter):
    def declare(self, sites: Sites) -> Iterator[Declared]:
        yield Insertion(sites(0, "ffn_output"), Single())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.filterwarnings("ignore:nothing stays", "ignore:.*for their position")
def test_exact_share_with_every_scorer_on_every_adapter(name: str, scorer: str) -> None:
    attachment = attached(ADAPTERS[name])
    before = attachment.count()
    masks = ht.sparsify(attachment, scorer=scorer, sparsity=0.4, batches=batches())
    assert masks.removed == round(0.4 * masks.entries)
    assert not pruned(attachment, masks).any()
    after = attachment.count()
    assert after["trained"].equals(before["trained"])
    for column in ("stored", "nonzero"):
        fewer = (before[column] - after[column]).to_dict()
        assert fewer == {"adapter": masks.removed, "norm": 0, "gate": 0, "head": 0}


@given(
    st.sampled_from(sorted(SCORERS)),
    st.floats(0, 0.99),
    st.sampled_from(["global", "tensor", "layer"]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 2),
)
def test_any_shape_sparsity_scope_and_rounds(
    scorer: str, sparsity: float, scope: str, rounds: int, width: int, layers: int
) -> None:
    adapter = ht.Houlsby(bottleneck=width, init="normal", activation="gelu")
    attachment = attached(adapter, num_hidden_layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # emptied tensors are another test's
        masks = ht.sparsify(
            attachment, scorer=scorer, sparsity=sparsity, scope=scope, batches=batches(), rounds=rounds
        )
    assert masks.removed == round(sparsity * masks.entries)
    table = masks.table({"global": "tensor", "tensor": "tensor", "layer": "layer"}[scope])
    if scope != "global":
        assert ((table["entries"] - table["kept"] - sparsity * table["entries"]).abs() < 1).all()
    assert not pruned(attachment, masks).any()


def test_nothing_but_the_pruned_entries_changes() -> None:
    attachment = attached(ht.Stack(ADAPTERS["houlsby"], ht.LayerNormTuning()))
    model = attachment.model
    model.train()
    model.base_model.encoder.eval()
    attachment.train_only("adapter")
    before = attachment.state_dict()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    random_state = torch.get_rng_state()
    masks = ht.sparsify(attachment, scorer="grasp", sparsity=0.5, batches=batches(), rounds=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    after = attachment.state_dict()
    for name, value in before.items():
        kept = masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(after[name], torch.where(kept, value, 0.0)), name
    masks.remove()
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())
    with pytest.raises(ArgumentError, match="not applied"):
        masks.remove()


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_same_seed_gives_the_same_masks(scorer: str) -> None:
    made = [
        ht.sparsify(attached(seed=seed), scorer=scorer, sparsity=0.5, batches=batches(), seed=mask_seed)
        for seed, mask_seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    one, same, other_weights, other_seed = (
        torch.cat([m.flatten() for m in masks.kept.values()]) for masks in made
    )
    assert torch.equal(one, same)
    random = SCORERS[scorer].blind
    assert torch.equal(one, other_weights) == random, "random masks do not depend on the weights"
    assert torch.equal(one, other_seed) != random, "other masks do not depend on the seed of the noise"


def test_rounds_keep_shrinking_shares_of_the_survivors() -> None:
    # by hand: two rounds of SNIP keep sqrt(0.25) = 1/2 of the entries, then 1/2 of these
    attachment, twin = attached(), attached()
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.75, batches=batches(), rounds=2)
    first = ht.sparsify(twin, scorer="snip", sparsity=0.5, batches=batches())
    own = {name: twin.named_parameters()[name] for name in first.kept}
    loss = sum(twin.model(**b).loss * len(b["labels"]) for b in batches())
    loss.backward()  # at the masked weights
    scores = torch.cat(
        [(p * p.grad).abs().where(first.kept[n], -1.0).flatten() for n, p in own.items()]
    ).detach()
    keep = masks.entries - round(0.75 * masks.entries)
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[scores.argsort(descending=True)[:keep]] = True
    found = torch.cat([mask.flatten() for mask in masks.kept.values()])
    assert torch.equal(found, expected)
    once = ht.sparsify(attached(), scorer="snip", sparsity=0.75, batches=batches())
    assert not torch.equal(found, torch.cat([mask.flatten() for mask in once.kept.values()]))


@pytest.mark.parametrize("bottleneck", [1, 16])
def test_odd_sizes(bottleneck: int) -> None:
    # 16 is the hidden size: down and up have one shape, and are told apart by name
    adapter = ht.Houlsby(bottleneck=bottleneck, init="normal", activation="gelu")
    attachment = attached(adapter, num_hidden_layers=1)
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=batches(), scope="tensor")
    assert masks.removed == masks.entries // 2
    assert [name.rpartition(".layers.0.")[2] for name in masks.kept] == [
        f"{site}.{part}.weight" for site in ("attention_output", "ffn_output") for part in ("down", "up")
    ]
    assert not pruned(attachment, masks).any()


@pytest.mark.parametrize("scorer", SCORERS)
def test_sparsity_zero_removes_nothing(scorer: str) -> None:
    attachment = attached()
    before = attachment.state_dict()
    masks = ht.sparsify(attachment, scorer=scorer, sparsity=0, batches=batches())
    assert (masks.removed, masks.density) == (0, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())
    assert attachment.count()["nonzero"].equals(attached().count()["nonzero"])


def test_a_tensor_with_one_parameter() -> None:
    attachment = attached(SingleAdapter())
    masks = ht.sparsify(attachment, scorer="magnitude", sparsity=0.4)
    assert (masks.entries, masks.removed) == (1, 0)
    masks.remove()
    with pytest.warns(
        UserWarning, match=r"nothing stays of tensor adapter\.layers\.0\.ffn_output\.shift; layer 0"
    ):
        masks = ht.sparsify(attachment, scorer="snip", sparsity=0.6, batches=batches())
    assert masks.report()["emptied"] == {
        "tensor": ["adapter.layers.0.ffn_output.shift"],
        "layer": [0],
        "site": ["ffn_output"],
    }


def test_a_layer_that_a_global_threshold_empties_is_reported() -> None:
    attachment = attached()
    with torch.no_grad():
        for name, parameter in attachment.named_parameters("adapter").items():
            if ".layers.1." in name:
                parameter.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"nothing stays of .*layer 1\b"):
        masks = ht.sparsify(attachment, scorer="magnitude", sparsity=0.5)
    report = masks.report()
    assert report["emptied"]["layer"] == [1]
    assert all(".layers.1." in name for name in report["emptied"]["tensor"])
    assert masks.table("layer").loc[1, "density"] == 0
    masks.remove()
    assert ht.sparsify(attachment, scorer="magnitude", sparsity=0.5, scope="layer").report()["emptied"] == {}


def test_ties_go_by_position_and_a_cut_through_many_warns() -> None:
    attachment = attached()
    with torch.no_grad():
        for parameter in attachment.named_parameters("adapter").values():
            parameter[parameter != 0] = 1.0
            parameter.view(-1)[0] = 2.0
    with pytest.warns(UserWarning, match="removed for their position"):
        masks = ht.sparsify(attachment, scorer="magnitude", sparsity=0.5, scope="tensor")
    assert masks.removed == masks.entries // 2
    for mask in masks.kept.values():
        assert mask.flatten()[: mask.numel() // 2].all(), "the first ones stay"
    assert masks.report()["tied"] == masks.removed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1}, r"sparsity=1 is not allowed; it must be >= 0 and < 1"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 is not allowed"),
        ({"sparsity": float("nan")}, "sparsity=nan is not allowed"),
        ({"sparsity": "0.5"}, "sparsity='0.5' is not allowed"),
        ({"scorer": "snap"}, "scorer='snap' is not allowed; choose one of 'random'"),
        ({"scope": "local"}, "scope='local' is not allowed"),
        ({"rounds": 0}, "rounds=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        (
            {"scorer": "snip", "batches": []},
            r"batches=\[\] is not allowed: scorer='snip' needs at least one batch",
        ),
        ({"scorer": "grasp", "batches": None}, r"batches=\[\] is not allowed: scorer='grasp'"),
        ({"warmup_steps": 3, "batches": iter(())}, "warmup_steps=3 needs at least one batch"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"scorer": "random", "sparsity": 0.5, "batches": batches(), **changes}
    with pytest.raises(ArgumentError, match=message):
        ht.sparsify(attached(), **given_)


def test_bad_batches_and_second_masks_are_refused() -> None:
    attachment = attached()
    unlabelled = [{name: value for name, value in batches()[0].items() if name != "labels"}]
    with pytest.raises(DataError, match=r"batches\[0\] is \['attention_mask', 'input_ids'\].*'labels'"):
        ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=unlabelled)
    ht.sparsify(attachment, scorer="random", sparsity=0.5)
    with pytest.raises(ArgumentError, match="has masks already"):
        ht.sparsify(attachment, scorer="random", sparsity=0.5)


def test_synflow_names_what_it_cannot_reach() -> None:
    with pytest.raises(UnsupportedError, match=r"'norm\.layers\.0.*is none"):
        ht.sparsify(attached(ht.LayerNormTuning()), scorer="synflow", sparsity=0.5, maskable="norms")
    with pytest.raises(UnsupportedError, match="Prefix reads no input"):
        ht.sparsify(
            attached(ht.PrefixTuning(2, bottleneck=None)), scorer="synflow", sparsity=0.5, maskable="prefixes"
        )


def test_scores_are_float32_under_a_half_precision_backbone_and_autocast() -> None:
    attachment = attached()
    expected = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=batches())
    expected.remove()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=batches())
    assert all(torch.equal(mask, expected.kept[name]) for name, mask in inside.kept.items())

    half = attached()
    half.model.bfloat16()
    values = copy.deepcopy(half.model.state_dict())
    masks = ht.sparsify(half, scorer="snip", sparsity=0.5, batches=batches())
    assert {value.dtype for value in half.model.state_dict().values() if value.is_floating_point()} == {
        torch.bfloat16
    }
    masks.remove()
    assert all(torch.equal(value, values[name]) for name, value in half.model.state_dict().items())


def test_masks_know_the_seeds_and_batches_that_made_them() -> None:
    one = ht.sparsify(attached(seed=3), scorer="snip", sparsity=0.5, batches=batches(), seed=7)
    assert (one.init_seed, one.data_seed, one.provenance["seed"]) == (3, None, 7)
    assert (one.provenance["batches"], one.provenance["examples"]) == (2, 7)
    same = ht.sparsify(attached(seed=4), scorer="snip", sparsity=0.5, batches=iter(batches()))
    other = ht.sparsify(attached(seed=3), scorer="snip", sparsity=0.5, batches=batches(seed=5))
    assert one.provenance["sha256"] == same.provenance["sha256"] != other.provenance["sha256"]
    relabelled = batches()
    relabelled[0]["labels"] = 1 - relabelled[0]["labels"]
    masks = ht.sparsify(attached(seed=3), scorer="snip", sparsity=0.5, batches=relabelled)
    assert masks.provenance["sha256"] != one.provenance["sha256"]
    assert ht.sparsify(attached(), scorer="magnitude", sparsity=0.5).provenance["sha256"] is None


def test_random_and_erdos_renyi_need_no_values_at_all() -> None:
    with torch.device("meta"):
        model = ht.backbone_from_config(attached().model.config)
    attachment = ht.attach(model, ht.Houlsby(bottleneck=3))
    masks = ht.sparsify(attachment, scorer="erdos-renyi", sparsity=0.75)
    assert masks.removed == round(0.75 * 576)
    assert attachment.count().loc["adapter", "nonzero"] == 576 - 432 + 6 * 19
    assert (
        ht.attach(attachment.detach(), ht.Houlsby(bottleneck=3)).count().loc["adapter", "nonzero"]
        == 576 + 6 * 19
    )


def test_erdos_renyi_is_denser_where_tensors_are_smaller() -> None:
    adapter = ht.Stack(ht.Houlsby(bottleneck=2), ht.LoRA(rank=1, targets=("ffn_output",)))
    table = ht.sparsify(attached(adapter, intermediate_size=64), scorer="erdos-renyi", sparsity=0.6).table()
    raw = table["shape"].map(lambda shape: sum(shape) / np.prod(shape))
    ratio = (table["density"] / raw)[table["density"] < 1]
    rounding = 1 / (raw * table["entries"]).min()
    assert ratio.max() - ratio.min() <= 2 * rounding
    assert table["density"].nunique() > 1


def test_what_is_left_out_is_recorded_as_it_was_taken() -> None:
    record = ht.sparsify(attached(), scorer="magnitude", sparsity=0.5).provenance
    expected = {"scope": "global", "rounds": 1, "maskable": "projections", "seed": 0, "warmup_steps": 0}
    assert {name: record[name] for name in expected} == expected
    assert record["warmup_rate"] is None
    warm = ht.sparsify(attached(), scorer="magnitude", sparsity=0.5, warmup_steps=1, batches=batches())
    assert (warm.provenance["warmup_steps"], warm.provenance["warmup_rate"]) == (1, 1e-3)
