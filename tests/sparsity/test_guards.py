"""Scores that cannot rank are refused, with cause and cure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.sites import Sites
from hadamard_toolkit.sparsity.guards import SHOWN, DegenerateScores, check_rank
from hadamard_toolkit.sparsity.scores import SCORERS, Scorer
from tests.sparsity.tiny import ADAPTERS, attached, batches


class Normed(SiteModule):
    """h + up(down(LN(h))), the input norm of SparseAdapter's attention adapters."""

    projections = ("down.weight", "up.weight")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, 3), nn.Linear(3, width)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        return hidden + self.up(self.down(self.norm(hidden)))


class NormedAdapter(Adapter):
    def declare(self, sites: Sites) -> Iterator[Declared]:
        yield Insertion(sites(0, "ffn_output"), Normed(sites(0, "ffn_output").width))


ZERO = r"up\.weight.*zero-initialised.*init=\"normal\".*warmup_steps"


@pytest.mark.parametrize(
    ("adapter", "scorer", "message"),
    [
        (ht.Houlsby(bottleneck=3), "snip", ZERO),
        (ht.Houlsby(bottleneck=3), "grasp", ZERO),
        (ht.Houlsby(bottleneck=3), "synflow", ZERO),
        (ht.Houlsby(bottleneck=3), "magnitude", ZERO),
        (ht.LoRA(rank=2), "snip", r"query\.B.*zero-initialised.*init=\"normal\""),
        (ht.LoRA(rank=2), "grasp", r"query\.B.*zero-initialised"),
        (ht.LoRA(rank=2), "magnitude", r"query\.B.*zero-initialised"),
        (NormedAdapter(), "synflow", r"down\.weight.*LayerNorm.*choose another scorer"),
        (
            ht.AdapterFusion(("one",)),
            "synflow",
            r"query', 'adapter.*softmax alone.*over one adapter.*fuse two",
        ),
        (ht.AdapterFusion(("one",)), "snip", r"query', 'adapter.*softmax alone.*over one adapter.*fuse two"),
    ],
)
def test_scores_that_cannot_rank_are_refused_with_cause_and_cure(
    adapter: Adapter, scorer: str, message: str
) -> None:
    attachment = attached(adapter)
    before = attachment.state_dict()
    with pytest.raises(DegenerateScores, match=message):
        ht.sparsify(attachment, scorer=scorer, sparsity=0.5, batches=batches())
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())
    assert attachment.masking is None


def test_behind_a_norm_the_other_scorers_work() -> None:
    for scorer in ("snip", "grasp", "magnitude"):
        masks = ht.sparsify(attached(NormedAdapter()), scorer=scorer, sparsity=0.5, batches=batches())
        assert masks.density == pytest.approx(0.5)


@pytest.mark.parametrize("adapter", [ht.Houlsby(bottleneck=4, activation="gelu"), ht.LoRA(rank=2)])
def test_a_warm_up_cures_zero_initialisation(adapter: Adapter) -> None:
    attachment = attached(adapter)
    head = {name: p.detach().clone() for name, p in attachment.named_parameters("head").items()}
    masks = ht.sparsify(attachment, scorer="snip", sparsity=0.3, batches=batches(), warmup_steps=5)
    assert masks.provenance["warmup_steps"] == 5
    assert masks.removed == round(0.3 * masks.entries)
    assert all(torch.equal(p, head[name]) for name, p in attachment.named_parameters("head").items())
    assert all(p.grad is None for p in attachment.model.parameters())
    again = ht.sparsify(attached(adapter), scorer="snip", sparsity=0.3, batches=batches(), warmup_steps=5)
    assert all(torch.equal(mask, again.kept[name]) for name, mask in masks.kept.items())


def test_vectors_at_their_identity_are_refused_by_magnitude_and_taken_by_random() -> None:
    attachment = attached(ht.Hadamard())
    with pytest.raises(DegenerateScores, match=r"all equal|zero-initialised"):
        ht.sparsify(attachment, scorer="magnitude", sparsity=0.5, maskable="vectors")
    masks = ht.sparsify(attachment, scorer="random", sparsity=0.5, maskable=("vectors", "norms"))
    assert set(masks.table()["kind"]) == {"vectors", "norms"}
    assert masks.entries == 3 * 4 * 16


def test_scores_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = attached()
    broken = Scorer(lambda scene: {n: torch.full(p.shape, torch.nan) for n, p in scene.parameters.items()})
    monkeypatch.setitem(SCORERS, "magnitude", broken)
    with pytest.raises(DataError, match=r"not finite for 'adapter\.layers\.0.*and 8 more"):
        ht.sparsify(attachment, scorer="magnitude", sparsity=0.5)
    with torch.no_grad():
        attachment.model.classifier.weight.fill_(torch.inf)
    with pytest.raises(DataError, match="the loss on a scoring batch is"):
        ht.sparsify(attachment, scorer="snip", sparsity=0.5, batches=batches())


def test_a_fusion_is_told_what_stops_its_scores() -> None:
    """A softmax that one adapter wins outright, or adapters that were never loaded; there is no LayerNorm in it."""
    adapter = ADAPTERS["fusion"]
    attachment = attached(adapter)
    part = attachment.insertions["layers.1.ffn_residual"].module
    with torch.no_grad():
        part.get_parameter("tasks.two.up.bias").fill_(1e4)  # one layer is enough
    with pytest.raises(DegenerateScores, match="saturated when all weights are") as synflow:
        ht.sparsify(attachment, scorer="synflow", sparsity=0.5)
    names = ("adapter.layers.1.ffn_residual.query", "adapter.layers.1.ffn_residual.key")
    assert f"entries of {names[0]!r}, {names[1]!r} the same score" in str(synflow.value)
    values = tuple(f"adapter.layers.{layer}.ffn_residual.value" for layer in range(3))
    with pytest.warns(
        UserWarning, match="for their position"
    ):  # fresh values are 1e-6 wherever they are not 1
        masks = ht.sparsify(attachment, scorer="synflow", sparsity=0.5, maskable=values)
    assert masks.removed == 3 * 128, "the cure"

    nothing = ht.attach(attached(adapter).detach(), adapter)
    for scorer in ("synflow", "snip"):
        with pytest.raises(DegenerateScores, match=r"'tasks\.one\.up\.weight'.*never loaded.*load_adapters"):
            ht.sparsify(nothing, scorer=scorer, sparsity=0.5, batches=batches())


def zeros(*names: str) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    scores = {name: torch.zeros(2, 2) for name in names}
    return scores, {name: nn.Parameter(torch.rand(2, 2)) for name in names}


def test_gradients_that_vanish_for_no_reason_of_the_adapter_are_put_down_to_the_data() -> None:
    scores, parameters = zeros("a", "b")
    scores["b"] = torch.rand(2, 2)
    with pytest.raises(DegenerateScores, match=r"of 'a' the same score.*narrow ReLU bottleneck is off"):
        check_rank("snip", scores, parameters, [])
    check_rank("random", *zeros("a"), [])


def test_what_follows_is_zero_where_ones_do_not_get_through_and_no_norm_is_there() -> None:
    with pytest.raises(
        DegenerateScores, match=r"all-ones input does not get through: what follows them is zero"
    ):
        check_rank("synflow", *zeros("a"), [])


def test_names_beyond_the_first_few_are_counted() -> None:
    names = [f"n{place}" for place in range(SHOWN + 2)]
    with pytest.raises(DegenerateScores, match=f"'n{SHOWN - 1}' and 2 more"):
        check_rank("snip", *zeros(*names), [])
    with pytest.raises(DegenerateScores, match=f"'n{SHOWN - 2}', 'n{SHOWN - 1}' the same"):
        check_rank("snip", *zeros(*names[:SHOWN]), [])
