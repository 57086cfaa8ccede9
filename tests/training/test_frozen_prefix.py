from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import StoreError, UnsupportedError
from hadamard_toolkit.training import feature_store
from hadamard_toolkit.training.bank import Member, train_bank
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.loop import Outcome, train
from hadamard_toolkit.training.protocol import Protocol
from tests.architectures import ARCHITECTURES, tiny_model
from tests.training.test_bank import still_model
from tests.training.test_question_answering import span_task
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

TASK = tiny_task(train=48, test=20)
CACHED = Protocol(
    head="first-then-frozen",
    learning_rate=5e-3,
    epochs=3,
    head_learning_rate=2e-2,
    head_epochs=2,
    batch_size=10,  # does not divide the rows
    eval_batch_size=16,
    max_length=24,
    frozen_prefix="cached",
)
ONE_STAGE = dataclasses.replace(CACHED, head="trained")
TOP = ht.Hadamard(layers=(2,))
REFUSED = ("t5",)


def go(attachment: ht.Attachment, protocol: Protocol = CACHED, **choices: Any) -> Outcome:
    return train(attachment, choices.pop("task", TASK), tiny_tokenizer(), protocol, **choices)


def assert_same(make: Any, protocol: Protocol = CACHED, **choices: Any) -> Outcome:
    """Train what `make` makes with and without the cache: the same weights, losses and predictions."""
    one, other = make(), make()
    cached = go(one, protocol, **choices)
    computed = go(other, dataclasses.replace(protocol, frozen_prefix="computed"), **choices)
    weights = one.state_dict()
    for name, value in other.state_dict().items():
        assert float((weights[name] - value).abs().max()) <= 1e-6, name
    for row, wanted in zip(cached.history, computed.history, strict=True):
        for name in set(wanted) - {"seconds"}:
            assert row[name] == pytest.approx(wanted[name], abs=1e-6), name
    for name, logits in computed.predictions.items():
        assert abs(cached.predictions[name] - logits).max() <= 1e-5
    assert "frozen_prefix" not in computed.details
    return cached


def count_calls(attachment: ht.Attachment, layer: int) -> list[int]:
    """Grows by the rows of every call in which `layer` computes its output projection."""
    rows: list[int] = []
    module = attachment.sites(layer, "attention_output").module
    module.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in REFUSED])
def test_with_dropout_off_cached_and_computed_train_the_same(architecture: str) -> None:
    def make() -> ht.Attachment:
        model = still_model(architecture)
        # In double precision, since Adam blows up the rounding of gradients that are zero in truth.
        return ht.attach(model.double(), ht.Hadamard(layers=(2,), norm=None))

    outcome = assert_same(make, ONE_STAGE)
    assert outcome.details["frozen_prefix"] == 2  # in bart, the whole encoder


@pytest.mark.parametrize("policy", ["trained", "frozen-random", "first-then-frozen"])
def test_every_head_policy_trains_the_same_in_single_precision(policy: str) -> None:
    protocol = dataclasses.replace(CACHED, head=policy)
    outcome = assert_same(lambda: ht.attach(still_model("bert"), TOP), protocol)
    assert outcome.details["frozen_prefix"] == 2
    assert outcome.details["stage_one"] == ("cached" if policy == "first-then-frozen" else None)


@pytest.mark.parametrize(
    ("adapter", "depth"),
    [
        (ht.Hadamard(layers=(1, 2)), 1),
        (ht.LoRA(rank=2, layers=(2,)), 2),
        (ht.Pfeiffer(bottleneck=4, layers=(1,)), 1),
        (ht.ParallelAdapter(bottleneck=4, layers=(2,)), 2),
        (ht.PrefixTuning(length=2, bottleneck=4, layers=(2,)), 2),
        (ht.LayerNormTuning(layers=(1, 2)), 1),
        (ht.Stack(ht.Hadamard(layers=(2,), norm=None), ht.LayerNormTuning(norm="output", layers=(1,))), 1),
        (ht.HeadOnly(), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Adapter) else str(value),
)
def test_every_adapter_starts_at_its_lowest_layer(adapter: Adapter, depth: int) -> None:
    outcome = assert_same(lambda: ht.attach(still_model("bert"), adapter), ONE_STAGE)
    assert outcome.details["frozen_prefix"] == depth


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("bert", ht.Hadamard()),
        ("bert", ht.PromptTuning(length=2)),
        ("bert", ht.BitFit()),
        ("bert", ht.FullFineTuning()),
        ("albert", ht.LayerNormTuning(layers=(2,))),  # layers share the norm
    ],
)
def test_with_nothing_frozen_below_there_is_no_cache(architecture: str, adapter: Adapter) -> None:
    """Dropout is on, and the bytes are those without the option."""
    trained = []
    for way in ("computed", "cached"):
        attachment = ht.attach(tiny_model(architecture), adapter)
        outcome = go(attachment, dataclasses.replace(ONE_STAGE, epochs=1, frozen_prefix=way))
        trained.append(attachment.state_dict())
    assert outcome.details["frozen_prefix"] == 0
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_the_layers_below_see_every_text_once() -> None:
    attachment, store = ht.attach(tiny_bert(), TOP), FeatureStore()
    below, lowest_trained = count_calls(attachment, 1), count_calls(attachment, 2)
    go(attachment, ONE_STAGE, feature_store=store)
    texts = len(TASK.splits["train"]) + len(TASK.splits["test"])
    probe = 2 * 8  # rows whose logits and states are compared before
    assert sum(below) == texts + probe
    held_out = 5
    epochs = 3 * len(TASK.splits["train"])
    assert sum(lowest_trained) == probe + epochs + held_out + len(TASK.splits["test"])  # none for the states
    again = ht.attach(tiny_bert(), ht.LoRA(rank=2, layers=(2,)), seed=1)  # another run that shares them
    below = count_calls(again, 1)
    outcome = go(again, dataclasses.replace(CACHED, learning_rate=1e-3), seed=1, feature_store=store)
    assert sum(below) == probe + 8 + len(TASK.splits["train"])  # the features of stage one, and nothing else
    assert outcome.times["features"] > 0


@pytest.mark.parametrize(
    ("changes", "task", "shared"),
    [
        ({}, {}, True),
        ({"epochs": 1, "batch_size": 7, "learning_rate": 1e-4}, {}, True),
        ({"precision": "bf16"}, {}, False),
        ({"max_length": 9}, {}, False),
        ({}, {"train": 40, "test": 22}, False),
    ],
)
def test_states_are_shared_by_what_they_were_made_from(
    changes: dict[str, Any], task: dict[str, int], shared: bool
) -> None:
    store, protocol = FeatureStore(), dataclasses.replace(ONE_STAGE, epochs=1)
    go(ht.attach(tiny_bert(), TOP), protocol, feature_store=store)
    before = set(store._held)
    go(
        ht.attach(tiny_bert(), TOP),
        dataclasses.replace(protocol, **changes),
        feature_store=store,
        task=tiny_task(**{"train": 48, "test": 20, **task}),
    )
    more = set(store._held) - before
    assert bool(more) is not shared


def test_states_in_bf16_are_computed_in_bf16() -> None:
    states = []
    for precision in ("fp32", "bf16"):
        store = FeatureStore()
        protocol = dataclasses.replace(ONE_STAGE, epochs=1, precision=precision)
        go(ht.attach(tiny_bert(), TOP), protocol, feature_store=store)
        states.append(torch.cat(list(store._held.values())).float())
    assert 1e-4 < float((states[0] - states[1]).abs().max()) < 0.2


def test_a_second_training_reuses_the_states_of_the_first() -> None:
    """Though the norms above have other values by then."""
    store, protocol = FeatureStore(), dataclasses.replace(ONE_STAGE, epochs=1)
    attachment = ht.attach(tiny_bert(), ht.LayerNormTuning(layers=(2,)))
    go(attachment, protocol, feature_store=store)
    before = len(store._held)
    attachment.train_only("head")  # what trained last does not matter
    go(attachment, protocol, feature_store=store)
    assert len(store._held) == before


def test_states_are_computed_without_dropout_whatever_mode_the_model_is_in() -> None:
    weights = []
    for training in (False, True):
        attachment = ht.attach(tiny_bert(hidden_dropout_prob=0.5), TOP)
        attachment.model.train(training)
        go(attachment, dataclasses.replace(ONE_STAGE, epochs=1))
        weights.append(attachment.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_another_layer_or_backbone_does_not_share() -> None:
    store, protocol = FeatureStore(), dataclasses.replace(ONE_STAGE, epochs=1)
    sizes = []
    for model, layer in ((tiny_bert(), 2), (tiny_bert(), 1), (tiny_bert(seed=1), 2)):
        go(ht.attach(model, ht.Hadamard(layers=(layer,))), protocol, feature_store=store)
        sizes.append(len(store._held))
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]


def test_dropout_is_off_below_and_on_above() -> None:
    """With the whole model below, two epochs at rate zero have one loss; with a layer above, they differ."""
    protocol = dataclasses.replace(
        ONE_STAGE, epochs=2, learning_rate=1e-12, batch_size=48, validation_rows=0, select="last"
    )
    losses = {}
    for depth, adapter in ((3, ht.HeadOnly()), (2, TOP)):
        model = tiny_bert(classifier_dropout=0.0)
        history = go(ht.attach(model, adapter), protocol).history
        losses[depth] = [row["loss"] for row in history]
    assert losses[3][0] == pytest.approx(losses[3][1], abs=1e-6)
    assert abs(losses[2][0] - losses[2][1]) > 1e-4


def test_the_same_spec_gives_the_same_bytes_wherever_the_states_are(tmp_path: Path) -> None:
    weights = []
    for store in (FeatureStore(), FeatureStore(tmp_path, memory=100), FeatureStore(tmp_path, memory=100)):
        attachment = ht.attach(tiny_bert(), TOP)
        go(attachment, feature_store=store)
        weights.append(attachment.state_dict())
    assert list(tmp_path.glob("states-*.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_the_model_is_left_as_it_was() -> None:
    attachment = ht.attach(tiny_bert(), TOP)
    go(attachment)
    layers = [attachment.sites.layer(index)[1] for index in range(3)]
    assert not any("forward" in vars(layer) for layer in layers)
    assert not attachment.model._forward_pre_hooks


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_file_of_states_is_computed_again(tmp_path: Path, damage: str) -> None:
    protocol = dataclasses.replace(ONE_STAGE, epochs=1)
    right = go(ht.attach(tiny_bert(), TOP), protocol, feature_store=FeatureStore(tmp_path, memory=100))
    file = max(tmp_path.glob("states-*"), key=lambda path: path.stat().st_size)
    good = file.read_bytes()
    bad = bytearray(good)
    bad[-1] ^= 1
    file.write_bytes({"truncated": bad[:-100], "one bit": bad, "empty": b""}[damage])
    attachment = ht.attach(tiny_bert(), TOP)
    below = count_calls(attachment, 0)
    again = go(attachment, protocol, feature_store=FeatureStore(tmp_path, memory=100))
    assert sum(below) == 2 * 8 + 16  # the probe and the rows of one file
    assert (again.predictions["test"] == right.predictions["test"]).all()
    assert file.read_bytes() == good


def test_states_that_fit_nowhere_are_one_error_before_the_first_step(tmp_path: Path) -> None:
    for store in (FeatureStore(memory=100), FeatureStore(tmp_path, memory=100, disk=1000)):
        attachment = ht.attach(tiny_bert(), TOP)
        before = attachment.state_dict()
        with pytest.raises(UnsupportedError, match=r"hidden states of .* tokens take .* GiB"):
            go(attachment, feature_store=store)
        assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_the_files_least_recently_used_make_room(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, memory=0, disk=10_000)
    states = torch.arange(1000.0)  # 4,000 bytes and a header
    for key in "ab":
        store.put_states(key, states, on_disk=True)
    store.put("features", torch.zeros(2))
    for age, name in ((40, "features"), (30, "states-a"), (20, "states-b")):
        file = tmp_path / f"{name}.safetensors"
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    assert store.get_states("a") is not None
    mapped = store.put_states("c", states, on_disk=True)
    assert torch.equal(mapped, states)
    assert store.get_states("b") is None
    assert store.get_states("a") is not None
    assert FeatureStore(tmp_path).get("features") is not None


def test_memory_forgets_the_states_least_recently_used() -> None:
    store = FeatureStore(memory=100)
    for key in "ab":
        store.put_states(key, torch.zeros(10), on_disk=False)  # 40 bytes
    assert store.get_states("a") is not None
    store.put_states("c", torch.zeros(10), on_disk=False)
    assert [store.get_states(key) is not None for key in "abc"] == [True, False, True]


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="hidden states cannot be written"):
        FeatureStore(blocked, memory=0).put_states("a", torch.zeros(3), on_disk=True)
    monkeypatch.setattr(feature_store, "_read", lambda path: None)
    with pytest.raises(StoreError, match="hidden states cannot be read back"):
        FeatureStore(tmp_path, memory=0).put_states("a", torch.zeros(3), on_disk=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ht.attach(tiny_model("t5"), ht.Hadamard(layers=(1,))), "T5.* cannot go on from the hidden"),
        (
            lambda: ht.attach(tiny_model("t5", num_decoder_layers=2), ht.Hadamard(layers=(3,))),
            "T5.* cannot go on from the hidden states of layer 2",
        ),
        (
            lambda: ht.attach(tiny_model("bart", decoder_layers=2), ht.Hadamard(layers=(3,))),
            "Bart.* cannot go on from the hidden states of layer 2",
        ),
        (
            lambda: ht.attach(tiny_bert(), ht.Pfeiffer(bottleneck=4, layers=(2,), gated="original")),
            "gated='original' reads padding",
        ),
    ],
)
def test_what_cannot_start_there_is_refused_before_the_first_step(make: Any, reason: str) -> None:
    attachment = make()
    before = attachment.state_dict()
    with pytest.raises(UnsupportedError, match=reason):
        go(attachment)
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())


def test_spans_are_refused() -> None:
    attachment = ht.attach(tiny_bert(head="span"), TOP)
    with pytest.raises(UnsupportedError, match="a head for span tasks reads padding"):
        go(attachment, task=span_task(12, 12))
    whole = go(ht.attach(tiny_bert(head="span"), ht.Hadamard()), task=span_task(12, 12))  # nothing to cache
    assert whole.details["frozen_prefix"] == 0


def test_a_head_that_trains_on_features_needs_no_prefix() -> None:
    assert "frozen_prefix" not in go(ht.attach(tiny_model("t5"), ht.HeadOnly())).details


def test_a_bank_is_refused() -> None:
    members = [Member(ht.attach(tiny_bert(), TOP), TASK, tiny_tokenizer(), CACHED, seed) for seed in (0, 1)]
    with pytest.raises(UnsupportedError, match="a bank computes the layers below"):
        train_bank(members)
