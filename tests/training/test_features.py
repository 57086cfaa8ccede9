from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.training import features
from hadamard_toolkit.training.batching import Examples, Padding, Source, tokenise
from hadamard_toolkit.training.evaluation import collect_in_evaluation, inputs_of, open_accelerator
from hadamard_toolkit.training.feature_store import FeatureStore
from hadamard_toolkit.training.features import (
    backbone_digest,
    feature_source,
    head_features,
    without_backbone,
)
from hadamard_toolkit.training.protocol import Protocol
from tests.architectures import ARCHITECTURES, tiny_config, tiny_model
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

ACCELERATOR = open_accelerator(Protocol())
COLLATE = Padding(tiny_tokenizer())


def examples(rows: int = 24) -> Examples:
    return tokenise(tiny_task(train=rows).splits["train"], ("text",), tiny_tokenizer(), 32)


def predict(model: PreTrainedModel, source: Source, batch_size: int) -> np.ndarray:
    return collect_in_evaluation(
        ACCELERATOR, model, source, batch_size, lambda batch: model(**inputs_of(batch)).logits
    )


def features_of(attachment: ht.Attachment, store: FeatureStore | None = None, rows: int = 24) -> torch.Tensor:
    return head_features(attachment, examples(rows), COLLATE, ACCELERATOR, 8, store or FeatureStore())


def count_passes(model: PreTrainedModel) -> list[int]:
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    model.base_model.register_forward_hook(count)
    return passes


CASES = [(name, {}) for name in ARCHITECTURES] + [("modernbert", {"classifier_pooling": "mean"})]


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_the_head_on_features_gives_the_logits_of_the_whole_model(
    architecture: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(architecture, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # away from a fresh model's near-constant answers
    rows = examples()
    whole = predict(model, Source(rows, COLLATE), 8)
    source = feature_source(model, features_of(ht.attach(model, ht.HeadOnly())), rows.labels)
    with without_backbone(model):
        from_features = predict(model, source, 24)
    assert np.abs(whole - from_features).max() < 1e-6
    assert np.ptp(whole, axis=0).min() > 1e-2  # rows differ, so agreement means something
    assert np.array_equal(whole, predict(model, Source(rows, COLLATE), 8))  # the backbone is back


def test_features_are_those_of_the_bare_backbone() -> None:
    plain = features_of(ht.attach(tiny_bert(), ht.HeadOnly()))
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    with torch.no_grad():
        for parameter in (*attachment.parameters("adapter"), *attachment.parameters("norm")):
            parameter.add_(0.5)
    assert torch.equal(plain, features_of(attachment))


def test_the_head_trains_through_the_stub_with_its_own_dropout() -> None:
    model = tiny_bert(classifier_dropout=0.5)
    rows = examples()
    source = feature_source(model, features_of(ht.attach(model, ht.HeadOnly())), rows.labels)
    batch = next(iter(source.training(8, seed=0)))
    del batch["row"]
    model.eval()
    with without_backbone(model):
        model.train()
        one, two = model(**batch), model(**batch)
        assert not torch.equal(one.logits, two.logits)
        one.loss.backward()
    assert model.base_model.training, "what was set inside the block holds for the backbone too"
    assert model.classifier.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


@pytest.mark.parametrize("head", ["span", "masked-lm"])
def test_heads_that_read_every_token_are_refused(head: str) -> None:
    with pytest.raises(UnsupportedError, match="reads every token"):
        features_of(ht.attach(tiny_bert(head=head), ht.HeadOnly()))


class MaxPooled(BertForSequenceClassification):
    """A head that reads all positions, but answers once per row."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **_: Any
    ) -> Any:
        output = self.bert(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        output.logits = self.classifier(output.last_hidden_state.amax(1))
        return output


def test_an_unknown_pooling_is_found_out_and_refused() -> None:
    torch.manual_seed(0)
    model = MaxPooled(tiny_config("bert"))
    with pytest.raises(UnsupportedError, match="MaxPooled reads none of: pooler output, first token"):
        features_of(ht.attach(model, ht.HeadOnly()))
    assert isinstance(model.bert, nn.Module)
    assert not model.bert._forward_hooks


def test_the_second_seed_and_the_second_method_do_no_backbone_pass(tmp_path: Path) -> None:
    first = features_of(ht.attach(tiny_bert(seed=0), ht.HeadOnly()), FeatureStore(tmp_path))
    model = tiny_bert(seed=0)
    model.classifier.weight.data.normal_()  # another head
    passes = count_passes(model)
    store = FeatureStore(tmp_path)  # a new session: from the file, then from memory
    assert torch.equal(first, features_of(ht.attach(model, ht.Hadamard()), store))
    next(tmp_path.iterdir()).unlink()
    third = tiny_bert(seed=0)
    passes_of_third = count_passes(third)
    assert torch.equal(first, features_of(ht.attach(third, ht.LayerNormTuning()), store))
    assert passes == passes_of_third == [0]


def test_a_changed_backbone_never_meets_old_features(tmp_path: Path) -> None:
    model = tiny_bert()
    attachment = ht.attach(model, ht.HeadOnly())
    store = FeatureStore(tmp_path)
    before = features_of(attachment, store)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1.0
    after = features_of(attachment, store)
    assert not torch.equal(before, after)
    assert torch.equal(after, features_of(attachment))
    assert len(list(tmp_path.iterdir())) == 2


def test_features_are_computed_without_dropout_whatever_mode_the_model_is_in() -> None:
    model = tiny_bert(hidden_dropout_prob=0.5)
    attachment = ht.attach(model, ht.HeadOnly())
    model.eval()
    still = features_of(attachment)
    model.train()
    assert torch.equal(still, features_of(attachment))
    assert model.training


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_do_not_depend_on_the_side_that_a_tokenizer_pads(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    attachment = ht.attach(tiny_bert(), ht.HeadOnly())
    collate = Padding(tokenizer)
    padded = head_features(attachment, examples(), collate, ACCELERATOR, 8, FeatureStore())
    assert torch.equal(padded, features_of(attachment))


def test_features_kept_in_an_older_format_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format 1 held rows padded on the left for tokenizers that prefer it."""
    attachment = ht.attach(tiny_bert(), ht.HeadOnly())
    passes = count_passes(attachment.model)
    monkeypatch.setattr(features, "FORMAT", 1)
    features_of(attachment, FeatureStore(tmp_path))
    monkeypatch.undo()
    computed = passes[0]
    features_of(attachment, FeatureStore(tmp_path))
    assert passes[0] == 2 * computed > 0
    features_of(attachment, FeatureStore(tmp_path))
    assert passes[0] == 2 * computed


def test_features_of_other_batches_are_kept_apart() -> None:
    """Rows are padded with their batch, so other batches round otherwise, and the same bytes need the same ones."""
    attachment, store = ht.attach(tiny_bert(), ht.HeadOnly()), FeatureStore()
    passes = count_passes(attachment.model)
    for size in (8, 6, 8):
        head_features(attachment, examples(), COLLATE, ACCELERATOR, size, store)
    probe = 1
    assert passes == [probe + 3 + probe + 4]


def test_other_rows_have_other_features() -> None:
    attachment, store = ht.attach(tiny_bert(), ht.HeadOnly()), FeatureStore()
    assert len(features_of(attachment, store, rows=24)) == 24
    assert len(features_of(attachment, store, rows=10)) == 10


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    attachment = ht.attach(tiny_bert(), ht.HeadOnly())
    right = features_of(attachment, FeatureStore(tmp_path))
    [file] = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes({"truncated": data[:-100], "one bit": data, "empty": b""}[damage])
    assert torch.equal(right, features_of(attachment, FeatureStore(tmp_path)))
    assert FeatureStore(tmp_path).get(file.stem) is not None  # and written again


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    store = FeatureStore(memory=100)
    for key in "abc":
        store.put(key, torch.zeros(10))  # 40 bytes
    assert store.get("a") is None
    assert store.get("b") is not None
    assert store.get("c") is not None


def test_the_digest_follows_weights_and_config_but_not_the_head() -> None:
    digest = backbone_digest(tiny_bert(seed=0))
    other_head = tiny_bert(seed=0)
    other_head.classifier.weight.data.zero_()
    assert backbone_digest(other_head) == digest
    assert backbone_digest(tiny_bert(seed=1)) != digest
    assert backbone_digest(tiny_bert(seed=0, layer_norm_eps=1e-3)) != digest


def test_a_model_that_is_its_own_backbone_has_no_head() -> None:
    message = "BertModel has no head apart from its base model"
    with pytest.raises(UnsupportedError, match=message), without_backbone(tiny_bert().base_model):
        pass
