"""A stage: gradients are clipped, and the epoch that is kept is the best one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hadamard_toolkit as ht
from hadamard_toolkit.training import stages
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.stages import Keeper
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_to_a_norm(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    make = stages.make_optimizer

    def watched(parameters: list[nn.Parameter], *choices: Any) -> torch.optim.AdamW:
        optimizer = make(parameters, *choices)
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters])))
        )
        return optimizer

    monkeypatch.setattr(stages, "make_optimizer", watched)
    protocol = Protocol(
        head="trained",
        epochs=1,
        batch_size=16,
        max_length=24,
        select="last",
        validation_rows=0,
        clip=clip,
    )
    train(ht.attach(tiny_bert(), ht.Hadamard()), tiny_task(), tiny_tokenizer(), protocol)
    assert len(norms) == 6
    if clip is None:
        assert min(norms) > 1e-2
    else:
        assert norms == pytest.approx([clip] * 6, rel=1e-3)


def offered(*epochs: tuple[float, float], **choices: Any) -> tuple[Keeper, torch.Tensor]:
    """A keeper that was offered metric and loss of every epoch, of which its one weight is the number."""
    weight = torch.zeros(1)
    keeper = Keeper([weight], Protocol(**choices))
    for epoch, (metric, loss) in enumerate(epochs, start=1):
        weight.fill_(epoch)
        keeper.offer(epoch, metric, loss)
    return keeper, weight


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.5, 0.3), (0.7, 0.9), (0.6, 0.1)], 2),  # the metric counts first, then the loss
        ([(0.5, 0.4), (0.5, 0.3), (0.5, 0.35)], 2),
        ([(0.5, 0.3), (0.5, 0.4)], 1),
        ([(0.5, 0.3), (0.5, 0.3)], 1),  # of equal epochs the first
    ],
)
def test_of_equal_metrics_the_lower_loss_is_kept(epochs: list[tuple[float, float]], best: int) -> None:
    keeper, weight = offered(*epochs)
    assert keeper.restore(len(epochs)) == best
    assert weight.item() == best


def test_patience_is_the_number_of_epochs_without_a_better_one() -> None:
    keeper, _ = offered((0.5, 0.4), patience=2)
    assert [keeper.exhausted(epoch) for epoch in (1, 2, 3)] == [False, False, True]
    keeper.offer(3, 0.6, 0.4)
    assert [keeper.exhausted(epoch) for epoch in (3, 4, 5)] == [False, False, True]
    assert not offered((0.5, 0.4))[0].exhausted(100), "without patience it goes on"
