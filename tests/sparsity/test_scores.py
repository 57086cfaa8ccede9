"""Every score against a brute-force computation in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sparsity.allocate import erdos_renyi
from hadamard_toolkit.sparsity.batches import Batches
from hadamard_toolkit.sparsity.maskable import targets
from hadamard_toolkit.sparsity.scores import SCORERS, Scene, Scores, _grad, scoring
from hadamard_toolkit.sparsity.spec import SCORERS as NAMES
from tests.sparsity.tiny import ADAPTERS, attached, batches

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
DATA = batches(3, 2)


def scores(
    attachment: ht.Attachment, scorer: str, data: Any = (), *, seed: int = 0, kept: Any = None
) -> Scores:
    parameters = {name: target.parameter for name, target in targets(attachment).items()}
    kept = kept or {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    with scoring(attachment, list(parameters.values())):
        return SCORERS[scorer].score(Scene(attachment, parameters, kept, Batches.of(data), seed))


def double(adapter: Any, **config: Any) -> ht.Attachment:
    attachment = attached(adapter, **{**SMALL, **config})
    attachment.model.double()
    with torch.no_grad():  # from 0.02 to a scale at which scores are well above rounding
        for parameter in attachment.model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    return attachment


def flat(found: Scores) -> Tensor:
    return torch.cat([score.flatten() for score in found.values()])


def loss_of(attachment: ht.Attachment, data: Any) -> Any:
    """L as a function of the flat vector of maskable weights: the mean over all examples."""
    model = attachment.model
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [target.parameter for target in targets(attachment).values()]
    rows = sum(len(batch["labels"]) for batch in data)

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters])
        values = {names[id(p)]: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        each = [functional_call(model, values, (), batch).loss * len(batch["labels"]) for batch in data]
        return torch.stack(each).sum() / rows

    return loss, torch.cat([p.detach().flatten() for p in parameters])


def test_the_names_are_the_scorers() -> None:
    assert tuple(SCORERS) == NAMES


@pytest.mark.parametrize("adapter", [ht.Houlsby(bottleneck=2, init="normal"), ht.LoRA(rank=2, init="normal")])
def test_snip_is_the_finite_difference_of_the_mask(adapter: Any) -> None:
    attachment = double(adapter)
    loss, weights = loss_of(attachment, DATA)
    step, expected = 1e-5, []
    with torch.no_grad():
        for entry in range(len(weights)):
            mask = torch.zeros_like(weights)
            mask[entry] = step
            expected.append((loss(weights * (1 + mask)) - loss(weights * (1 - mask))) / (2 * step))
    found = flat(scores(attachment, "snip", DATA))
    assert torch.allclose(found, torch.stack(expected).abs(), rtol=1e-5, atol=1e-9)
    assert found.max() > 1e-4


@pytest.mark.parametrize(
    "adapter",
    [ht.Houlsby(bottleneck=2, init="normal", activation="tanh"), ht.LoRA(rank=1, init="normal")],
)
def test_grasp_is_weight_times_explicit_hessian_times_gradient(adapter: Any) -> None:
    attachment = double(adapter)
    loss, weights = loss_of(attachment, DATA)
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, weights)
        gradient = torch.autograd.functional.jacobian(loss, weights)
    expected = weights * (hessian @ gradient)
    found = flat(scores(attachment, "grasp", DATA))
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-14)
    assert (found < 0).any(), "signed"
    assert (found > 0).any()

    # what it is for: removing an entry changes gᵀg by -2 θ H g to first order
    entry = int(found.argmin())
    small = torch.zeros_like(weights)
    small[entry] = 1e-6 * weights[entry]
    with sdpa_kernel(SDPBackend.MATH):
        after = torch.autograd.functional.jacobian(loss, weights - small)
    change = (after @ after - gradient @ gradient) / 1e-6
    assert change == pytest.approx(-2 * float(found[entry]), rel=1e-3)
    assert change > 0, "the lowest score goes first, which raises the gradient norm"


def test_grasp_leaves_removed_entries_out_of_the_direction() -> None:
    attachment = double(ht.LoRA(rank=1, init="normal"))
    own = {name: target.parameter for name, target in targets(attachment).items()}
    noise = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(p.shape, generator=noise) < 0.6 for name, p in own.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter *= kept[name]
    loss, weights = loss_of(attachment, DATA)
    mask = flat({name: value.double() for name, value in kept.items()})
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, weights)
        gradient = torch.autograd.functional.jacobian(loss, weights)
    found = flat(scores(attachment, "grasp", DATA, kept=kept))
    assert torch.allclose(found, weights * (hessian @ (mask * gradient)), rtol=1e-7, atol=1e-14)


def test_synflow_sums_the_paths_of_a_linear_network() -> None:
    attachment = double(ht.Houlsby(bottleneck=2, init="normal", activation="linear"))
    own = {name: target.parameter.detach() for name, target in targets(attachment).items()}
    found = scores(attachment, "synflow")
    for prefix in ("adapter.layers.0.attention_output", "adapter.layers.0.ffn_output"):
        down, up = own[f"{prefix}.down.weight"], own[f"{prefix}.up.weight"]
        expected = {"down": torch.zeros_like(down), "up": torch.zeros_like(up)}
        for i, k, j in product(range(8), range(2), range(8)):  # input i, unit k, output j
            path = float(down[k, i].abs() * up[j, k].abs())
            expected["down"][k, i] += path
            expected["up"][j, k] += path
        for name, value in expected.items():
            assert torch.allclose(found[f"{prefix}.{name}.weight"], value, rtol=1e-12)


def test_synflow_scales_lora_and_ignores_signs() -> None:
    attachment = double(ht.LoRA(rank=2, alpha=6.0, targets=("query",), init="normal"))
    a, b = (t.parameter.detach() for t in targets(attachment).values())
    found = scores(attachment, "synflow")
    expected = 3.0 * a.abs() * b.abs().sum(0)[:, None]
    assert torch.allclose(found["adapter.layers.0.query.A"], expected, rtol=1e-12)
    before = {name: p.detach().clone() for name, p in attachment.named_parameters().items()}
    scores(attachment, "synflow")
    assert all(torch.equal(p, before[name]) for name, p in attachment.named_parameters().items())


def test_magnitude_and_random() -> None:
    attachment = attached()
    own = {name: target.parameter.detach() for name, target in targets(attachment).items()}
    assert all(torch.equal(s, own[name].abs()) for name, s in scores(attachment, "magnitude").items())
    noise = flat(scores(attachment, "random", seed=3))
    assert torch.equal(noise, flat(scores(attachment, "random", seed=3)))
    assert not torch.equal(noise, flat(scores(attachment, "random", seed=4)))
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 4 / len(noise) ** 0.5


def test_random_masks_do_not_know_the_weights_drawn_under_the_same_seed() -> None:
    attachment = attached(ht.Houlsby(bottleneck=16, init="normal"), seed=5)
    weights = torch.cat([t.parameter.detach().flatten() for t in targets(attachment).values()])
    noise = flat(scores(attachment, "random", seed=5))
    assert abs(torch.corrcoef(torch.stack([weights, noise]))[0, 1]) < 4 / len(noise) ** 0.5


def test_erdos_renyi_closed_form_with_caps() -> None:
    shapes = {"small": (2, 2), "wide": (4, 20), "square": (10, 10), "vector": (5,)}
    raw = {"small": 4 / 4, "wide": 24 / 80, "square": 20 / 100, "vector": 6 / 5}
    low = erdos_renyi(shapes, 25)
    factor = 25 / (4 + 24 + 20 + 6)
    assert low == pytest.approx({name: factor * value for name, value in raw.items()})
    # 80 kept: factor 80/54 > 1, so "small" and "vector" (raw 1 and 1.2) are full, and the others share what is left
    high = erdos_renyi(shapes, 80)
    factor = (80 - 9) / (24 + 20)
    assert high == pytest.approx({"small": 1.0, "vector": 1.0, "wide": factor * 0.3, "square": factor * 0.2})
    assert erdos_renyi(shapes, 189) == pytest.approx(dict.fromkeys(shapes, 1.0))
    assert erdos_renyi(shapes, 0) == dict.fromkeys(shapes, 0.0)


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
def test_the_cut_into_batches_does_not_matter(scorer: str) -> None:
    attachment = double(ht.Houlsby(bottleneck=2, init="normal"))
    [whole] = batches(6)
    parts = [
        {key: value[start:end] for key, value in whole.items()} for start, end in ((0, 4), (4, 5), (5, 6))
    ]
    one, three = (flat(scores(attachment, scorer, data)) for data in ([whole], parts))
    assert torch.allclose(one, three, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("scorer", NAMES)
def test_every_scorer_ranks_every_adapter(name: str, scorer: str) -> None:
    attachment = attached(ADAPTERS[name])
    found = scores(attachment, scorer, batches())
    assert set(found) == set(targets(attachment))
    for score in found.values():
        assert torch.isfinite(score).all()
        assert score.min() < score.max()


@pytest.mark.parametrize("architecture", ["albert", "gpt2", "t5", "modernbert", "deberta", "mpnet"])
def test_data_scores_on_other_architectures(architecture: str) -> None:
    attachment = attached(ht.Houlsby(bottleneck=3, init="normal"), architecture=architecture)
    for scorer in ("snip", "grasp", "synflow"):
        assert flat(scores(attachment, scorer, batches())).abs().sum() > 0


def test_synflow_scores_an_adapter_in_double_precision_too() -> None:
    masks = {}
    for double in (False, True):
        attachment = attached()
        if double:
            attachment.model.double()
        masks[double] = ht.sparsify(attachment, scorer="synflow", sparsity=0.5).kept
    assert all(torch.equal(kept, masks[True][name]) for name, kept in masks[False].items())


def test_a_loss_that_no_parameter_moves_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    for loss in (0.0, torch.tensor(1.0), parameter.detach().sum()):
        with pytest.raises(ArgumentError, match="the loss does not depend on the maskable parameters"):
            _grad(loss, [parameter])
    used, unused = _grad((2 * parameter).sum(), [parameter, torch.nn.Parameter(torch.ones(3))])
    assert (used.tolist(), unused.tolist()) == ([2, 2], [0, 0, 0])


def test_scores_are_computed_where_the_parameters_are() -> None:
    parameters = {"a": torch.nn.Parameter(torch.ones(2, device="meta"))}
    scene = Scene(attached(), parameters, {}, Batches.of(batches()), 0)
    assert scene.device == torch.device("meta")
