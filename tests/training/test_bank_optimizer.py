from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW

from hadamard_toolkit.training.bank_optimizer import Course, StackedAdamW
from tests.training.test_bank import shortly


def test_the_optimizer_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,)}
    start = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    courses = [
        Course(shortly(weight_decay=0.1, clip=0.5, warmup=0.2), 1e-2, 30),
        Course(shortly(betas=(0.8, 0.95), epsilon=1e-5, clip=None), 3e-2, 30),
    ]
    ours = StackedAdamW(start, courses, {})
    theirs = []
    for run, course in enumerate(courses):
        parameters = [nn.Parameter(start[name][run].clone()) for name in shapes]
        protocol = course.protocol
        optimizer = AdamW(
            [
                {"params": parameters[:1], "weight_decay": protocol.weight_decay},
                {"params": parameters[1:], "weight_decay": 0.0},
            ],
            lr=course.learning_rate, betas=protocol.betas, eps=protocol.epsilon, fused=True,
        )  # fmt: skip
        theirs.append((parameters, optimizer, course.rates()))
    targets = [torch.randn(2, *shape, generator=generator) for shape in shapes.values()]
    for step in range(30):
        pairs = zip(ours.leaves.values(), targets, strict=True)
        ours.step(sum((p - t).pow(2).flatten(1).sum(1) for p, t in pairs), step)  # type: ignore[arg-type]
        for run, (parameters, optimizer, rates) in enumerate(theirs):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad()
            sum((p - t[run]).pow(2).sum() for p, t in zip(parameters, targets, strict=True)).backward()  # type: ignore[union-attr]
            if courses[run].protocol.clip is not None:
                nn.utils.clip_grad_norm_(parameters, courses[run].protocol.clip)  # type: ignore[arg-type]
            optimizer.step()
    for run, (parameters, _, _) in enumerate(theirs):
        for name, parameter in zip(shapes, parameters, strict=True):
            assert torch.allclose(ours.leaves[name][run], parameter, rtol=0, atol=1e-6)


def test_what_the_loss_does_not_use_stays_as_it_is() -> None:
    """Nor does it decay, as in torch's optimizers, whose parameters have no gradient then."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(2, 4, 4, generator=generator) for name in ("used", "idle")}
    ours = StackedAdamW(start, [Course(shortly(weight_decay=0.5), 1e-1, 3)] * 2, {})
    for step in range(3):
        ours.step(ours.leaves["used"].pow(2).flatten(1).sum(1), step)
    assert torch.equal(ours.leaves["idle"], start["idle"])
    assert not torch.allclose(ours.leaves["used"], start["used"], atol=1e-2)


def test_masks_and_courses_stay_with_the_runs_that_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    removed = torch.rand(3, 4, 4, generator=generator) < 0.5
    start = torch.randn(3, 4, 4, generator=generator) * ~removed
    courses = [Course(shortly(), rate, 4) for rate in (1e-1, 1e-2, 1e-3)]
    ours = StackedAdamW({"matrix": start}, courses, {"matrix": removed})
    kept = [0, 2]
    ours.keep(kept)
    for step in range(4):
        ours.step((ours.leaves["matrix"] - 5).pow(2).flatten(1).sum(1), step)
    after = ours.leaves["matrix"].detach()
    assert torch.equal(after == 0, removed[kept])
    moved = (after - start[kept]).abs().flatten(1).amax(1)
    assert moved[0] > 20 * moved[1] > 0, "each by its own rate"
