from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import hadamard_toolkit as ht
from hadamard_toolkit.errors import TrainingError
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.training import stages
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.loop import Outcome, stages_of, train
from hadamard_toolkit.training.protocol import Protocol
from tests.architectures import tiny_config
from tests.training.test_features import MaxPooled
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHORT = Protocol(
    head="first-then-frozen",
    learning_rate=2e-2,
    epochs=2,
    head_learning_rate=2e-2,
    head_epochs=3,
    batch_size=16,
    max_length=24,
)


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LONGER: dict[str, Any] = {"epochs": 12, "learning_rate": 5e-2, "head_epochs": 10}


def shortly(**changes: Any) -> Protocol:
    return dataclasses.replace(SHORT, **changes)


def go(
    attachment: ht.Attachment, task: Task | None = None, protocol: Protocol = SHORT, **choices: Any
) -> Outcome:
    return train(attachment, task or tiny_task(), TOKENIZER, protocol, **choices)


def changed_roles(attachment: ht.Attachment, before: dict[str, torch.Tensor]) -> set[str]:
    after = attachment.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


def frozen_state(attachment: ht.Attachment) -> dict[str, torch.Tensor]:
    own = {id(parameter) for parameter in attachment.parameters()}
    return {n: p.detach().clone() for n, p in attachment.model.named_parameters() if id(p) not in own}


def test_two_stages_learn_what_the_head_alone_cannot() -> None:
    task = tiny_task(train=192, test=100)
    head = go(ht.attach(tiny_bert(**STILL), ht.HeadOnly()), task, shortly(**LONGER))
    both = go(ht.attach(tiny_bert(**STILL), ht.Hadamard()), task, shortly(**LONGER))
    assert both.metrics["test"]["accuracy"] > 0.9
    assert both.metrics["test"]["accuracy"] > head.metrics["test"]["accuracy"] + 0.08


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        ("trained", {"adapter", "norm", "head"}),
        ("frozen-random", {"adapter", "norm"}),
        ("first-then-frozen", {"adapter", "norm", "head"}),
    ],
)
def test_head_policies_change_what_they_say_and_nothing_else(policy: str, roles: set[str]) -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    before, backbone = attachment.state_dict(), frozen_state(attachment)
    go(attachment, protocol=shortly(head=policy))
    assert changed_roles(attachment, before) == roles
    counts = attachment.count()["trained"]
    assert {role for role in counts.index if counts[role]} == roles
    for name, value in frozen_state(attachment).items():
        assert torch.equal(value, backbone[name]), name
    assert not attachment.model.training


def test_stage_two_leaves_the_head_of_stage_one_alone() -> None:
    two = ht.attach(tiny_bert(), ht.Hadamard())
    one = ht.attach(tiny_bert(), ht.HeadOnly())
    go(two)
    go(one)
    assert torch.equal(two.model.classifier.weight, one.model.classifier.weight)


@pytest.mark.parametrize(
    "adapter", [ht.PromptTuning(length=3), ht.PrefixTuning(length=3), ht.Houlsby(bottleneck=4, init="normal")]
)
def test_stage_one_without_a_cache_is_on_the_bare_backbone_too(adapter: Any) -> None:
    protocol = shortly(stage_one="full", head_epochs=1, epochs=1)
    two, one = (ht.attach(tiny_bert(**STILL), method) for method in (adapter, ht.HeadOnly()))
    go(two, protocol=protocol)
    go(one, protocol=protocol)
    assert torch.equal(two.model.classifier.weight, one.model.classifier.weight)


def test_full_fine_tuning_trains_the_backbone() -> None:
    attachment = ht.attach(tiny_bert(), ht.FullFineTuning())
    before = attachment.state_dict()
    go(attachment, protocol=shortly(head="trained", learning_rate=1e-3))
    assert changed_roles(attachment, before) == {"adapter", "head"}


def test_stage_one_on_features_is_stage_one_without_backbone_dropout() -> None:
    task, heads = tiny_task(), {}
    for way in ("cached", "full"):
        attachment = ht.attach(tiny_bert(**STILL), ht.HeadOnly())
        outcome = go(attachment, task, shortly(stage_one=way, batch_size=96, clip=None))
        assert outcome.details["stage_one"] == way
        heads[way] = attachment.model.classifier.weight.detach().clone()
    assert torch.allclose(heads["cached"], heads["full"], atol=1e-4)


def test_a_head_that_cannot_be_cached_falls_back_and_says_so() -> None:
    torch.manual_seed(0)
    attachment = ht.attach(WithLoss(tiny_config("bert")), ht.Hadamard())
    outcome = go(attachment)
    assert outcome.details["stage_one"] == "full"
    assert "reads none of" in outcome.details["fallback"]
    assert [row["stage"] for row in outcome.history] == [1, 1, 1, 2, 2]


class WithLoss(MaxPooled):
    """The same with a loss, as training needs."""

    def forward(self, *inputs: Any, labels: Any = None, **named: Any) -> Any:
        output = super().forward(*inputs, **named)
        if labels is not None:
            output.loss = torch.nn.functional.cross_entropy(output.logits, labels)
        return output


def test_a_feature_store_spares_the_second_seed_the_backbone() -> None:
    store, passes = FeatureStore(), []
    for seed in (0, 1):
        model = tiny_bert()
        count = [0]
        model.base_model.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        go(ht.attach(model, ht.HeadOnly()), seed=seed, feature_store=store)
        passes.append(count[0])
    assert passes[0] > 0
    assert passes[1] == 0


def test_a_warm_store_gives_the_same_bytes_as_a_cold_one() -> None:
    store = FeatureStore()
    states = []
    for _ in range(2):
        attachment = ht.attach(tiny_bert(), ht.Hadamard())
        go(attachment, feature_store=store)
        states.append(save(attachment.state_dict()))
    assert states[0] == states[1]


@pytest.mark.parametrize("adapter", [ht.Hadamard(), ht.FullFineTuning()])
def test_the_same_seed_gives_the_same_bytes_whatever_happened_before(adapter: Any) -> None:
    states, outcomes = [], []
    for noise in (0, 7):
        torch.manual_seed(noise)
        torch.rand(noise)
        attachment = ht.attach(tiny_bert(), adapter)
        outcomes.append(go(attachment, seed=3))
        states.append(save(attachment.state_dict()))
    assert states[0] == states[1]
    assert outcomes[0].metrics == outcomes[1].metrics
    other = ht.attach(tiny_bert(), adapter)
    go(other, seed=4)
    assert save(other.state_dict()) != states[0]


def test_outcome_is_complete_and_in_row_order() -> None:
    task = tiny_task(test_mismatched=12, test=40)
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    outcome = go(attachment, task, shortly(test_rows=20, train_rows=64, validation_rows=16))
    assert set(outcome.metrics) == set(outcome.predictions) == {"validation", "test", "test_mismatched"}
    assert outcome.predictions["test"].shape == (20, 2)
    assert outcome.predictions["test_mismatched"].shape == (12, 2)
    for name, split in (("test", "test"), ("validation", "train")):
        rows = task.splits[split].select(outcome.rows[name])
        assert outcome.labels[name].tolist() == rows["label"]
        for text, logits in zip(rows["text"], outcome.predictions[name], strict=True):
            with torch.no_grad():
                alone = attachment.model(**TOKENIZER(text, return_tensors="pt")).logits[0]
            assert np.allclose(alone, logits, atol=1e-5)
        assert outcome.metrics[name]["accuracy"] == pytest.approx(
            (outcome.predictions[name].argmax(1) == outcome.labels[name]).mean()
        )
    assert outcome.details["parts"]["test"] | {"sha256": ""} == {
        "split": "test",
        "rows": 20,
        "of": 40,
        "sha256": "",
    }
    assert list(outcome.times) == ["features", "stage_one", "stage_two", "evaluation"]
    assert all(seconds > 0 for seconds in outcome.times.values())
    json.dumps([outcome.metrics, outcome.history, outcome.times, outcome.details])


def test_what_did_not_happen_took_no_time() -> None:
    outcome = go(ht.attach(tiny_bert(), ht.Hadamard()), protocol=shortly(head="trained", epochs=1))
    assert outcome.times["features"] == outcome.times["stage_one"] == 0.0


def test_history_has_one_row_per_epoch_and_the_rate_warms_up_and_falls() -> None:
    outcome = go(ht.attach(tiny_bert(), ht.Hadamard()), protocol=shortly(epochs=4, warmup=0.3))
    assert [(row["stage"], row["epoch"]) for row in outcome.history] == [
        *((1, epoch) for epoch in (1, 2, 3)),
        *((2, epoch) for epoch in (1, 2, 3, 4)),
    ]
    second = [row for row in outcome.history if row["stage"] == 2]
    assert [row["step"] for row in second] == [6, 12, 18, 24]
    assert set(second[0]) == {
        "stage", "epoch", "step", "loss", "learning_rate", "seconds", "eval_loss", "eval_accuracy", "eval_f1",
    }  # fmt: skip
    rates = [row["learning_rate"] for row in second]
    assert max(rates) == rates[1] > rates[2] > rates[3] > 0


def test_the_best_epoch_on_validation_rows_is_kept() -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    outcome = go(attachment, protocol=shortly(epochs=5, learning_rate=0.1, schedule="constant"))
    second = [row for row in outcome.history if row["stage"] == 2]
    best = max(second, key=lambda row: (row["eval_accuracy"], -row["eval_loss"]))
    assert outcome.details["selected"]["stage_two"] == best["epoch"]
    assert outcome.metrics["validation"]["accuracy"] == best["eval_accuracy"]
    assert outcome.metrics["validation"]["loss"] == pytest.approx(best["eval_loss"], abs=1e-5)


def test_the_last_epoch_is_kept_when_asked_for_and_needs_no_validation_rows() -> None:
    outcome = go(ht.attach(tiny_bert(), ht.Hadamard()), protocol=shortly(select="last", validation_rows=0))
    assert outcome.details["selected"] == {"stage_one": 3, "stage_two": 2}
    assert set(outcome.metrics) == {"test"}
    assert "eval_loss" not in outcome.history[0]


def test_patience_ends_a_stage_early() -> None:
    task = tiny_task()
    outcome = go(
        ht.attach(tiny_bert(), ht.Hadamard()), task, shortly(epochs=50, learning_rate=1e-12, patience=2)
    )
    assert len([row for row in outcome.history if row["stage"] == 2]) < 50


def test_regression_learns_and_reports_correlations() -> None:
    attachment = ht.attach(tiny_bert(head="regression", **STILL), ht.Hadamard())
    outcome = go(attachment, tiny_task("regression", train=192), shortly(**LONGER))
    assert outcome.predictions["test"].shape == (40, 1)
    assert outcome.metrics["test"]["pearson"] > 0.8
    assert set(outcome.metrics["test"]) == {"pearson", "spearman", "loss"}


def test_weights_decay_in_matrices_only() -> None:
    attachment = ht.attach(tiny_bert(), ht.FullFineTuning())
    optimizer = stages.make_optimizer(attachment.parameters("adapter"), 1e-3, shortly(weight_decay=0.3))
    for group in optimizer.param_groups:
        wanted = 0.3 if group["params"][0].ndim >= 2 else 0.0
        assert group["weight_decay"] == wanted
        assert len({parameter.ndim >= 2 for parameter in group["params"]}) == 1


@pytest.mark.parametrize(("field", "stage"), [("learning_rate", 2), ("head_learning_rate", 1)])
def test_divergence_is_one_clear_error_and_leaves_the_model_as_it_was(field: str, stage: int) -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    before = attachment.state_dict()
    with pytest.raises(
        TrainingError, match=rf"stage {stage} .*epoch \d+, step \d+, at learning rate .*Lower {field}"
    ):
        go(attachment, protocol=shortly(**{field: 1e38}, clip=None, epochs=4))
    after = attachment.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not attachment.model.training
    go(attachment)  # still usable


def test_the_reported_step_is_the_first_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    calls = []

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if module.training:
            calls.append(1)
            if len(calls) == 4:
                output.loss = output.loss * float("nan")
        return output

    attachment.model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(TrainingError, match=r"became nan in stage 1 .*epoch 1, step 4"):
        go(attachment, protocol=shortly(head="trained"))


def test_bf16_and_fp32_runs_may_follow_each_other_and_parameters_stay_float32() -> None:
    results = {}
    for precision in ("fp32", "bf16", "fp32"):
        attachment = ht.attach(tiny_bert(), ht.Hadamard())
        results[precision] = go(attachment, protocol=shortly(precision=precision))
        assert {p.dtype for p in attachment.model.parameters()} == {torch.float32}
        assert "forward" not in vars(attachment.model)
    gap = np.abs(results["bf16"].predictions["test"] - results["fp32"].predictions["test"]).max()
    assert 0 < gap < 0.5


def test_a_stage_without_parameters_is_left_out() -> None:
    assert [stage.name for stage in stages_of(ht.attach(tiny_bert(), ht.HeadOnly()), SHORT)] == ["stage_one"]
    assert [stage.roles for stage in stages_of(ht.attach(tiny_bert(), ht.Hadamard()), SHORT)] == [
        ("head",),
        ("adapter", "norm", "gate"),
    ]


def test_the_labels_of_the_task_have_their_names_afterwards() -> None:
    attachment, task = ht.attach(tiny_bert(), ht.Hadamard()), tiny_task()
    go(attachment, task, shortly())
    assert attachment.labels == list(task.labels)
    assert attachment.task == task.name
    assert attachment.model.config.id2label == dict(enumerate(task.labels))
