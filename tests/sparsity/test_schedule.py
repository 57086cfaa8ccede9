"""Pruning during training: the cubic schedule, the same masks, and nothing selected before they are final."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, TrainingError
from hadamard_toolkit.training.protocol import Protocol
from tests.sparsity.tiny import attached, pruned
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

NEVER = AdamW([torch.nn.Parameter(torch.zeros(1))])


def test_the_targets_follow_zhu_and_gupta() -> None:
    gradual = ht.GradualPruning(attached(), sparsity=0.8, begin=0.2, end=0.8)
    for step, way in ((0, 0.0), (20, 0.0), (35, 0.25), (50, 0.5), (80, 1.0), (100, 1.0)):
        assert gradual.target(step, 100) == pytest.approx(0.8 * (1 - (1 - way) ** 3))


def test_masks_narrow_exactly_and_in_time() -> None:
    attachment = attached()
    gradual = ht.GradualPruning(attachment, sparsity=0.8, begin=0.2, end=0.8, every=10)
    entries, history, before = gradual.masks.entries, [], gradual.masks
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        with torch.no_grad():  # training goes on, and enforces nothing itself
            for name, parameter in gradual.parameters.items():
                parameter += 0.01 * torch.randn(parameter.shape, generator=noise) * before.kept[name]
        unsettled = gradual(step, 100, NEVER)
        now = ht.Masks.of(attachment)
        assert all((mask <= before.kept[name]).all() for name, mask in now.kept.items()), (
            "once removed, removed"
        )
        assert not pruned(attachment, now).any()
        assert unsettled == (step < 80)
        history.append(now.removed)
        before = now
    changes = [step for step in range(2, 101) if history[step - 1] != history[step - 2]]
    assert changes == [30, 40, 50, 60, 70, 80]
    assert [history[step - 1] for step in changes] == [
        round(gradual.target(step, 100) * entries) for step in changes
    ]
    assert history[-1] == round(0.8 * entries)
    values = torch.cat([p.detach().abs().flatten() for p in gradual.parameters.values()])
    kept = torch.cat([mask.flatten() for mask in before.kept.values()])
    assert values[kept].min() > 0


@pytest.mark.parametrize("scope", ["global", "tensor", "layer"])
def test_the_lowest_magnitudes_go_within_the_scope(scope: str) -> None:
    attachment = attached()
    gradual = ht.GradualPruning(attachment, sparsity=0.5, begin=0.0, end=0.5, every=1, scope=scope)
    dense = attachment.state_dict()
    gradual(5, 10, NEVER)
    once = ht.sparsify(attached(), scorer="magnitude", sparsity=0.5, scope=scope)
    found = ht.Masks.of(attachment)
    assert all(torch.equal(mask, once.kept[name]) for name, mask in found.kept.items())
    found.remove()
    assert all(torch.equal(value, dense[name]) for name, value in attachment.state_dict().items())


def test_momentum_of_removed_entries_is_cleared() -> None:
    attachment = attached()
    gradual = ht.GradualPruning(attachment, sparsity=0.5, begin=0.0, end=0.5, every=1)
    optimizer = AdamW(attachment.parameters("adapter"), lr=1e-2, weight_decay=0.1)
    for step in range(1, 9):
        optimizer.zero_grad()
        sum((p - 1).pow(2).sum() for p in attachment.parameters("adapter")).backward()
        optimizer.step()
        gradual(step, 10, optimizer)
    masks = ht.Masks.of(attachment)
    assert masks.removed == masks.entries // 2
    assert not pruned(attachment, masks).any()
    for name, parameter in gradual.parameters.items():
        for value in (optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]):
            assert not value[~masks.kept[name]].any()
            assert value[masks.kept[name]].all()


TRAINING = Protocol(
    learning_rate=2e-2, epochs=4, batch_size=16, weight_decay=0.3, max_length=24, validation_rows=16
)


def test_training_selects_among_final_masks_only() -> None:
    attachment = ht.attach(tiny_bert(), ht.Houlsby(bottleneck=4))  # zero init is fine: magnitudes come later
    gradual = ht.GradualPruning(attachment, sparsity=0.7, begin=0.1, end=0.6, every=2)
    protocol = Protocol(**{**TRAINING.to_dict(), "patience": 1})
    outcome = ht.train(attachment, tiny_task(), tiny_tokenizer(), protocol, on_step=gradual)
    masks = ht.Masks.of(attachment)
    assert masks.removed == round(0.7 * masks.entries)
    assert not pruned(attachment, masks).any(), "also after the selected epoch was put back"
    assert len(outcome.history) >= 3, "patience waits for the end of the schedule"
    assert outcome.details["selected"]["stage_two"] >= 3, "60 % of 4 epochs are over in epoch 3"


def test_stage_one_does_not_prune_and_failure_puts_everything_back() -> None:
    calls = []

    def on_step(step: int, steps: int, optimizer: Optimizer) -> bool:
        calls.append((step, steps))
        return False

    two = Protocol(**{**TRAINING.to_dict(), "head": "first-then-frozen", "head_epochs": 3, "epochs": 2})
    ht.train(
        ht.attach(tiny_bert(), ht.Houlsby(bottleneck=4)), tiny_task(), tiny_tokenizer(), two, on_step=on_step
    )
    assert calls == [(step, 10) for step in range(1, 11)]

    attachment = ht.attach(tiny_bert(), ht.Houlsby(bottleneck=4, init="normal"))
    gradual = ht.GradualPruning(attachment, sparsity=0.7, begin=0.0, end=0.5, every=1)
    before = attachment.state_dict()

    def failing(step: int, steps: int, optimizer: Optimizer) -> bool:
        if step == 6:
            raise TrainingError("now")
        return gradual(step, steps, optimizer)

    with pytest.raises(TrainingError, match="now"):
        ht.train(attachment, tiny_task(), tiny_tokenizer(), TRAINING, on_step=failing)
    assert ht.Masks.of(attachment).removed == 0
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"begin": 0.5, "end": 0.5}, "end=0.5 is not allowed"),
        ({"end": 1.1}, "end=1.1"),
        ({"every": 0}, "every=0"),
        ({"scope": "head"}, "scope='head'"),
        ({"maskable": "vectors"}, "no vectors"),
    ],
)
def test_bad_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.GradualPruning(attached(), **{"sparsity": 0.5, **changes})


def test_a_schedule_has_its_masks_for_itself() -> None:
    attachment = attached()
    gradual = ht.GradualPruning(attachment, sparsity=0.8, end=0.8)
    with pytest.raises(ArgumentError, match="has masks already"):
        ht.GradualPruning(attachment, sparsity=0.8)
    gradual.masks.remove()
    with pytest.raises(ArgumentError, match="the masks of this schedule were removed while it ran"):
        gradual(80, 100, NEVER)


def test_weights_that_are_not_finite_are_not_ranked() -> None:
    gradual = ht.GradualPruning(attached(), sparsity=0.8, end=0.8)
    with torch.no_grad():
        next(iter(gradual.parameters.values()))[0, 0] = float("nan")
    with pytest.raises(DataError, match="magnitude"):
        gradual(80, 100, NEVER)


def test_a_one_step_run_reaches_its_sparsity() -> None:
    attachment = attached()
    gradual = ht.GradualPruning(attachment, sparsity=0.5)
    assert gradual(1, 1, NEVER) is False
    assert ht.Masks.of(attachment).removed == gradual.masks.entries // 2
