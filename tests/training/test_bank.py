from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError, TrainingError, UnsupportedError
from hadamard_toolkit.training.bank import Member, train_bank
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.loop import Outcome, train
from hadamard_toolkit.training.protocol import Protocol
from tests.architectures import tiny_basis, tiny_config
from tests.training.test_loop import WithLoss
from tests.training.tiny import tiny_task, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TASK = tiny_task(train=64, test=20)
SHORT = Protocol(
    head="first-then-frozen",
    learning_rate=5e-3,
    epochs=2,
    head_learning_rate=2e-2,
    head_epochs=3,
    batch_size=10,  # does not divide the rows
    max_length=24,
)
HADAMARD = ht.Hadamard()
METHODS: dict[str, Adapter] = {
    "Hadamard": HADAMARD,
    "LayerNormTuning": ht.LayerNormTuning(),
    "HeadOnly": ht.HeadOnly(),
    "BitFit": ht.BitFit(),
    "LoRA": ht.LoRA(rank=2),
    "Pfeiffer": ht.Pfeiffer(bottleneck=4),
    "Houlsby": ht.Houlsby(bottleneck=4),
    "ParallelAdapter": ht.ParallelAdapter(bottleneck=4),
    "IA3": ht.IA3(),
    "PrefixTuning": ht.PrefixTuning(length=2, bottleneck=4),
    "PromptTuning": ht.PromptTuning(length=2),
    "UniPELT": ht.UniPELT(bottleneck=4, length=2, rank=2, prefix_bottleneck=4, gated="masked"),
    "MAM": ht.MAM(bottleneck=4, length=2, prefix_bottleneck=4),
    "FullFineTuning": ht.FullFineTuning(),
}


def shortly(**changes: Any) -> Protocol:
    return dataclasses.replace(SHORT, **changes)


def still_model(architecture: str, head: str = "classification") -> Any:
    """Without dropout, its weights wide enough for rows to differ."""
    config = tiny_config(architecture, initializer_range=0.2)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return ht.backbone_from_config(config, head=head)


def member(
    adapter: Adapter = HADAMARD,
    protocol: Protocol = SHORT,
    *,
    seed: int = 0,
    architecture: str = "bert",
    task: Any = TASK,
) -> Member:
    """A run with a head of its own over the backbone that all share."""
    model = still_model(architecture, task.kind)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith(model.base_model_prefix):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Member(ht.attach(model, adapter, seed=seed), task, TOKENIZER, protocol, seed)


def alone(one: Member) -> Outcome:
    return train(one.attachment, one.task, one.tokenizer, one.protocol, seed=one.seed)


def assert_as_alone(banked: Sequence[Member], single: Sequence[Member], atol: float = 1e-6) -> list[Any]:
    """Train `banked` together and `single`, which is equal, one by one: weights and records are the same."""
    outcomes = train_bank(banked)
    for one, other, found in zip(banked, single, outcomes, strict=True):
        expected = alone(other)
        assert isinstance(found, Outcome), found
        weights = one.attachment.state_dict()
        for name, value in other.attachment.state_dict().items():
            gap = float((weights[name] - value).abs().max())
            assert gap <= atol, f"{name} is off by {gap}"
        assert found.details == expected.details | {"bank": len(banked)}
        assert [list(row) for row in found.history] == [list(row) for row in expected.history]
        for row, wanted in zip(found.history, expected.history, strict=True):
            for name in set(row) - {"seconds"}:
                assert row[name] == pytest.approx(wanted[name], abs=1e-5), name
        for name, scores in expected.metrics.items():
            assert found.metrics[name] == pytest.approx(scores, abs=1e-5)
            assert np.allclose(found.predictions[name], expected.predictions[name], atol=1e-5)
            assert np.array_equal(found.labels[name], expected.labels[name])
        assert (one.attachment.count() == other.attachment.count()).all(axis=None)
        assert list(found.times) == list(expected.times)
        assert not one.attachment.model.training
    return outcomes


def twice(make: Any, *arguments: Any) -> tuple[list[Member], list[Member]]:
    return [make(argument) for argument in arguments], [make(argument) for argument in arguments]


LONG = shortly(head="trained", epochs=8, validation_rows=0, select="last")
RATES = (2e-3, 1e-3)


def fifty_steps(method: str, seed: int) -> Member:
    return member(METHODS[method], dataclasses.replace(LONG, learning_rate=RATES[seed]), seed=seed)


@pytest.mark.parametrize("method", ["Hadamard", "LayerNormTuning", "LoRA", "Pfeiffer"])
def test_fifty_steps_give_what_each_run_gives_alone(method: str) -> None:
    outcomes = assert_as_alone(*twice(lambda seed: fifty_steps(method, seed), 0, 1))
    assert outcomes[0].history[-1]["step"] >= 50


@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_of_every_method_in_double_precision(method: str) -> None:
    """Where Adam does not blow up the rounding of gradients that are zero in truth, such as those of key biases."""

    def make(seed: int) -> Member:
        one = fifty_steps(method, seed)
        one.attachment.model.double()
        return one

    assert_as_alone(*twice(make, 0, 1), atol=1e-8)


def test_runs_of_a_bank_may_differ_in_their_basis(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path))

    def make(seed: int) -> Member:
        basis = tiny_basis(seed, scale=2.0)
        protocol = shortly(learning_rate=2e-2 * (1 + seed))
        return member(ht.Subspace(ht.Hadamard(norm=None), basis, k=4), protocol, seed=seed)

    banked, single = twice(make, 0, 1, 2)
    assert len({one.attachment.adapter.basis for one in banked}) == 3  # type: ignore[attr-defined]
    assert_as_alone(banked, single)
    names = [name for name in banked[0].attachment.named_parameters("adapter") if "coefficients" in name]
    states = [one.attachment.state_dict() for one in banked]
    assert all(len({tuple(state[name].tolist()) for name in names}) == 1 for state in states)
    assert len({tuple(state[names[0]].tolist()) for state in states}) == 3
    other = member(dataclasses.replace(banked[0].attachment.adapter, k=3))  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError, match="the same adapter"):
        train_bank([make(0), other])


def test_norms_in_a_subspace_bank(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path))

    def make(seed: int) -> Member:
        basis = tiny_basis(seed, sites=("attention_norm", "ffn_norm"))
        return member(
            ht.Subspace(ht.LayerNormTuning("both"), basis, k=4), shortly(learning_rate=2e-2), seed=seed
        )

    assert_as_alone(*twice(make, 0, 1))


def test_gates_over_padding_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="padding"):
        train_bank([member(ht.Pfeiffer(bottleneck=4, gated="original"))])


def test_the_padding_row_of_an_embedding_has_no_gradient_in_any_run() -> None:
    """The tiny mpnet reads texts that begin with the token 1, which it holds for padding."""

    def make(seed: int) -> Member:
        return member(ht.FullFineTuning(), shortly(stage_one="full"), seed=seed, architecture="mpnet")

    banked = [make(seed) for seed in (0, 1, 2)]
    name = "mpnet.embeddings.word_embeddings.weight"
    before = banked[0].attachment.model.get_parameter(name).clone()
    train_bank(banked)
    for one in banked:
        after = one.attachment.model.get_parameter(name)
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[2], before[2])


def test_one_run_is_a_bank_too() -> None:
    assert_as_alone(*twice(lambda seed: member(seed=seed), 5))


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused_with_the_reason(architecture: str) -> None:
    one = member(architecture=architecture)
    before = one.attachment.state_dict()
    with pytest.raises(UnsupportedError, match="looks for end tokens"):
        train_bank([one])
    after = one.attachment.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_stop_early_each_on_its_own() -> None:
    def make(seed: int) -> Member:
        rate = {0: 1e-12, 1: 2e-2, 2: 1e-2}[seed]
        return member(protocol=shortly(epochs=8, patience=2, learning_rate=rate), seed=seed)

    outcomes = assert_as_alone(*twice(make, 0, 1, 2))
    lengths = [len([row for row in outcome.history if row["stage"] == 2]) for outcome in outcomes]
    assert len(set(lengths)) > 1


def test_runs_differ_in_rows_batches_epochs_clipping_decay_and_schedule() -> None:
    protocols = [
        shortly(clip=None, weight_decay=0.1, train_rows=40),
        shortly(clip=0.05, batch_size=7, epochs=4, schedule="constant", warmup=0.3),
        shortly(betas=(0.8, 0.98), epsilon=1e-6, select="last", validation_rows=0),
    ]
    assert_as_alone(*twice(lambda run: member(ht.LoRA(rank=2), protocols[run], seed=run), 0, 1, 2))


def test_tasks_differ_in_their_rows_and_splits() -> None:
    tasks = [TASK, tiny_task(train=30, test=12, validation=10, test_other=9)]
    outcomes = assert_as_alone(*twice(lambda task: member(task=tasks[task], seed=task), 0, 1))
    assert set(outcomes[1].metrics) == {"validation", "test", "test_other"}


def test_regression_banks_too() -> None:
    task = tiny_task("regression", train=48, test=20)
    assert_as_alone(*twice(lambda seed: member(task=task, seed=seed), 0, 1))


def test_heads_alone_are_trained_and_scored_on_features() -> None:
    outcomes = assert_as_alone(*twice(lambda seed: member(ht.HeadOnly(), seed=seed), 0, 1))
    assert outcomes[0].details["stage_one"] == "cached"
    assert [row["stage"] for row in outcomes[0].history] == [1, 1, 1]


def test_stage_one_through_the_whole_backbone() -> None:
    assert_as_alone(*twice(lambda seed: member(protocol=shortly(stage_one="full"), seed=seed), 0, 1))


def test_masks_hold_and_differ_between_runs() -> None:
    def make(seed: int) -> Member:
        one = member(ht.Pfeiffer(bottleneck=4, init="normal"), shortly(weight_decay=0.1), seed=seed)
        ht.sparsify(one.attachment, scorer="random", sparsity=0.5, seed=seed)
        return one

    banked, single = twice(make, 0, 1)
    assert_as_alone(banked, single)
    for one in banked:
        state, masking = one.attachment.state_dict(), one.attachment.masking
        assert masking is not None
        assert all(not state[name][~kept].any() for name, kept in masking.kept.items())


def test_masks_hold_in_stage_two_where_another_run_failed_in_stage_one() -> None:
    def make(seed: int) -> Member:
        rate = 1e38 if seed == 0 else 2e-2
        one = member(ht.Pfeiffer(bottleneck=4), shortly(head_learning_rate=rate, clip=None), seed=seed)
        ht.sparsify(one.attachment, scorer="random", sparsity=0.5, seed=seed)
        return one

    failed, *banked = [make(seed) for seed in (0, 1, 2)]
    before = failed.attachment.state_dict()
    outcomes = train_bank([failed, *banked])
    assert isinstance(outcomes[0], TrainingError)
    assert all(torch.equal(value, before[name]) for name, value in failed.attachment.state_dict().items())
    for one, single in zip(banked, [make(seed) for seed in (1, 2)], strict=True):
        alone(single)
        weights = one.attachment.state_dict()
        for name, value in single.attachment.state_dict().items():
            assert torch.allclose(weights[name], value, rtol=0, atol=1e-6), name


def test_a_run_that_diverges_fails_alone() -> None:
    def make(seed: int) -> Member:
        rate = 1e38 if seed == 1 else 5e-3
        return member(protocol=shortly(learning_rate=rate, clip=None, epochs=4), seed=seed)

    banked = [make(seed) for seed in (0, 1, 2)]
    before = banked[1].attachment.state_dict()
    outcomes = train_bank(banked)
    with pytest.raises(TrainingError) as alone_says:
        alone(make(1))
    assert isinstance(outcomes[1], TrainingError)
    assert str(outcomes[1]) == str(alone_says.value)
    after = banked[1].attachment.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for seed in (0, 2):
        other = make(seed)
        alone(other)
        weights = banked[seed].attachment.state_dict()
        for name, value in other.attachment.state_dict().items():
            assert torch.allclose(weights[name], value, rtol=0, atol=1e-6), name


def test_a_run_that_cannot_be_trained_fails_alone() -> None:
    outcomes = train_bank([member(seed=0), member(seed=1, protocol=shortly(train_rows=1000))])
    assert isinstance(outcomes[0], Outcome)
    assert isinstance(outcomes[1], ArgumentError)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"adapter": ht.Hadamard(layers=(0,))}, "same adapter"),
        ({"protocol": shortly(precision="bf16")}, "same precision"),
        ({"architecture": "electra"}, "same"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(other: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        train_bank([member(), member(**other)])


def test_another_backbone_is_refused() -> None:
    one, other = member(), member()
    other.attachment.model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight").data[0, 0] += 1e-3
    with pytest.raises(UnsupportedError, match="same backbone"):
        train_bank([one, other])


def test_features_are_shared_with_runs_alone() -> None:
    store = FeatureStore()
    train_bank([member(seed=seed) for seed in (0, 1)], feature_store=store)
    held = set(store._held)
    for seed in (0, 1):
        one = member(seed=seed)
        train(one.attachment, TASK, TOKENIZER, SHORT, seed=seed, feature_store=store)
    assert set(store._held) == held


def test_dropout_differs_between_equal_runs_and_repeats_with_the_bank() -> None:
    def weights() -> list[torch.Tensor]:
        banked = [member(seed=0) for _ in range(2)]
        for one in banked:
            for module in one.attachment.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.3
        train_bank(banked)
        return [torch.cat([p.flatten() for p in one.attachment.parameters("adapter")]) for one in banked]

    first, again = weights(), weights()
    assert not torch.allclose(first[0], first[1], atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_half_precision_banks() -> None:
    banked, single = twice(lambda seed: member(protocol=shortly(precision="bf16"), seed=seed), 0, 1)
    for found, one in zip(train_bank(banked), single, strict=True):
        assert isinstance(found, Outcome)
        expected = alone(one)
        assert [row["loss"] for row in found.history] == pytest.approx(
            [row["loss"] for row in expected.history], rel=0.05
        )


def test_heads_that_cannot_be_cached_fall_back_together_and_say_so() -> None:
    members = []
    for seed in (0, 1):
        torch.manual_seed(0)
        attachment = ht.attach(WithLoss(tiny_config("bert")), HADAMARD, seed=seed)
        members.append(Member(attachment, TASK, TOKENIZER, SHORT, seed))
    for outcome in train_bank(members):
        assert isinstance(outcome, Outcome), outcome
        assert outcome.details["stage_one"] == "full"
        assert "reads none of" in outcome.details["fallback"]
