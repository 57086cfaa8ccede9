"""Continued pretraining: the text, the step itself, its cache, and its place in runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError, DataError, DownloadError, UnsupportedError
from hadamard_toolkit.runs.run import run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.tasks import Task
from hadamard_toolkit.tasks.base import in_memory
from hadamard_toolkit.training import continued_pretraining
from hadamard_toolkit.training.continued_pretraining import CORPORA, adapt, gather
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.masked_lm import MaskedText
from hadamard_toolkit.training.pretraining_step import ContinuedPretraining
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.protocols import dapt, tapt
from tests.architectures import tiny_config
from tests.permissions import read_only
from tests.runs.conftest import PROTOCOL
from tests.training.tiny import tiny_bert

PAIRS = {"sun": "warm", "moon": "cold", "sea": "blue", "wood": "green"}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *PAIRS, *PAIRS.values(), *(f"w{n}" for n in range(40))]
STEP = ContinuedPretraining(epochs=4, learning_rate=5e-3, batch_size=16, max_length=16)


def mask_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, `[CLS] a [SEP]`, with a mask token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


TOKENIZER = mask_tokenizer()


def sentences(count: int, seed: int) -> list[str]:
    """Seven words; the second tells the fourth, the others are among eight of the vocabulary."""
    chance, found = random.Random(seed), []
    for _ in range(count):
        word, rest = chance.choice([*PAIRS]), chance.choices(WORDS[13:21], k=5)
        found.append(" ".join([rest[0], word, rest[1], PAIRS[word], *rest[2:]]))
    return found


def text_task(train: list[str], test: list[str]) -> Task:
    rows = {
        name: in_memory({"text": texts, "label": [row % 2 for row in range(len(texts))]})
        for name, texts in (("train", train), ("test", test))
    }
    return Task("pairs", DatasetDict(rows), ("text",), "classification", ("a", "b"), "accuracy")


TASK = text_task(sentences(400, 0), sentences(20, 1))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT without any head, in a folder."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    tiny_bert(vocab_size=len(WORDS)).base_model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def base_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.base_model.named_parameters()}


def test_every_field_of_a_step_is_what_it_is_trained_with(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ContinuedPretraining(
        rows=60, epochs=2, learning_rate=3e-4, batch_size=9, mask_share=0.4, max_length=8, weight_decay=0.3,
        warmup=0.2, precision="bf16", seed=5,
    )  # fmt: skip
    seen: list[Any] = []
    train = continued_pretraining.train_stage
    monkeypatch.setattr(continued_pretraining, "train_stage", lambda *args: (seen.append(args), train(*args)))
    model, _ = ht.load_backbone(backbone)
    [record] = continued_pretraining.adapt(model, backbone, TASK, [step], folder=tmp_path)
    [(run, stage, training, validation)] = seen
    protocol = run.protocol
    assert (stage.epochs, stage.learning_rate, stage.roles) == (2, 3e-4, ("adapter", "head"))
    assert (protocol.epochs, protocol.learning_rate, protocol.batch_size) == (2, 3e-4, 9)
    assert (protocol.weight_decay, protocol.warmup, protocol.precision) == (0.3, 0.2, "bf16")
    assert (protocol.select, validation, run.seed) == ("last", None, 5)
    assert (run.kind._masker.mlm_probability, run.kind.max_length, run.kind.seed) == (0.4, 8, 5)
    assert max(training.rows.lengths) == 8
    assert record["updates"] == 2 * -(-len(training.rows) // 9)


# the text ----------------------------------------------------------------------------------------------------------


def test_text_is_different_training_text_and_never_test_text() -> None:
    task = text_task(["a", "b", " b ", "c", "", "d", "e"], ["c", "z"])
    corpus = gather(ContinuedPretraining(), task)
    assert sorted(corpus.texts + corpus.held_out) == ["a", "b", "d", "e"]
    assert len(corpus.held_out) == 1
    assert corpus.record["test_texts_dropped"] == 1
    assert corpus.record["origin"] == [{"task": "pairs", "source": None, "files": None, "note": None}]
    other = gather(ContinuedPretraining(seed=1), task)
    assert sorted(other.texts + other.held_out) == ["a", "b", "d", "e"]
    assert other.record["sha256"] != corpus.record["sha256"]
    with pytest.raises(DataError, match="text='task' has 1 texts"):
        gather(ContinuedPretraining(), text_task(["a", "b"], ["b", "c"]))


def test_no_text_of_a_second_test_split_is_trained_on() -> None:
    task = text_task(["a", "b", "c", "d"], ["c"])
    task.splits["test_mismatched"] = in_memory({"text": ["d", "e"], "label": [0, 1]})
    corpus = gather(ContinuedPretraining(), task)
    assert sorted(corpus.texts + corpus.held_out) == ["a", "b"]
    assert corpus.record["test_texts_dropped"] == 2


def test_rows_limit_the_text_and_held_out_text_is_apart() -> None:
    corpus = gather(ContinuedPretraining(rows=40), TASK)
    assert (len(corpus.texts), len(corpus.held_out)) == (40, 2)
    assert not set(corpus.texts) & set(corpus.held_out)
    assert set(corpus.texts) <= set(TASK.splits["train"]["text"])


def test_columns_of_a_pair_are_texts_of_their_own() -> None:
    rows = {
        name: in_memory({"q": [f"{name} q"] * 2, "c": [f"{name} c"] * 2, "label": [0, 1]})
        for name in ("train", "test")
    }
    task = Task("two", DatasetDict(rows), ("q", "c"), "classification", ("a", "b"), "accuracy")
    corpus = gather(ContinuedPretraining(), task)
    assert sorted(corpus.texts + corpus.held_out) == ["train c", "train q"]


def test_a_domain_is_the_training_text_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str) -> Task:
        asked.append(name)
        return text_task([f"{name} {n}" for n in range(5)], ["never"])

    monkeypatch.setattr(continued_pretraining, "load_task", load)
    corpus = gather(dapt("cs"), TASK)
    assert asked == ["acl-arc", "scierc"] == list(CORPORA["cs"])
    assert sorted(corpus.texts + corpus.held_out) == sorted(f"{name} {n}" for name in asked for n in range(5))
    gather(dapt("SST-2"), TASK)
    assert asked[2:] == ["sst2"]
    with pytest.raises(ArgumentError, match="text='poetry' is not allowed; choose one of 'task', 'biomed'"):
        gather(dapt("poetry"), TASK)


# the step ----------------------------------------------------------------------------------------------------------


def test_the_loss_falls_the_base_changes_and_the_head_of_the_task_stays(
    backbone: str, tmp_path: Path
) -> None:
    model, _ = ht.load_backbone(backbone, labels=3, seed=5)
    before, head = base_of(model), model.classifier.weight.detach().clone()
    torch.manual_seed(1)
    (record,) = adapt(model, backbone, TASK, (STEP,), folder=tmp_path)
    assert record["loss_after"] < record["loss_before"] - 0.5
    assert record["train_loss"][-1] < record["train_loss"][0] - 0.5
    after = base_of(model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(model.classifier.weight, head)
    with torch.no_grad():
        assert torch.isfinite(model(**TOKENIZER("w1 sun", return_tensors="pt")).logits).all()


def test_the_record_tells_the_text_the_training_and_the_fresh_head(backbone: str, tmp_path: Path) -> None:
    model, _ = ht.load_backbone(backbone)
    (record,) = adapt(
        model, backbone, TASK, (dataclasses.replace(STEP, rows=100, epochs=1),), folder=tmp_path
    )
    different = len(set(TASK.splits["train"]["text"]) - set(TASK.splits["test"]["text"]))
    assert record["rows"] == min(100, different - record["held_out_rows"])
    assert record["tokens"] == (7 + 2) * record["rows"]
    assert record["updates"] == -(-record["rows"] // 16)
    assert len(record["sha256"]) == len(record["weights_sha256"]) == 64
    assert record["fresh_head"] is True
    assert "tied to the word embeddings" in record["note"]
    assert record["settings"]["mask_share"] == 0.15
    assert record["reused"] is False
    json.dumps(record)


def test_a_checkpoint_with_a_head_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "with-head"
    tiny_bert(head="masked-lm", vocab_size=len(WORDS)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    model, _ = ht.load_backbone(str(folder))
    (record,) = adapt(
        model, str(folder), TASK, (dataclasses.replace(STEP, rows=20, epochs=1),), folder=tmp_path / "kept"
    )
    assert (record["fresh_head"], record["note"]) == (False, "")


def test_what_was_done_once_is_read_and_trains_nothing(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = ht.load_backbone(backbone, labels=2)
    two, _ = ht.load_backbone(backbone, head="span", seed=9)
    short = dataclasses.replace(STEP, rows=50, epochs=1)
    (first,) = adapt(one, backbone, TASK, (short,), folder=tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(continued_pretraining, "train_stage", never)
    (second,) = adapt(two, backbone, TASK, (short,), folder=tmp_path)
    assert second["reused"] is True
    assert {**second, "reused": False} == first
    left, right = base_of(one), base_of(two)
    assert all(torch.equal(left[name], right[name]) for name in right if "pooler" not in name)
    for change in ({"mask_share": 0.3}, {"epochs": 2}, {"seed": 1}, {"rows": 51}):
        with pytest.raises(AssertionError, match="trained again"):
            adapt(two, backbone, TASK, (dataclasses.replace(short, **change),), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [first["key"]]


def test_damaged_weights_are_made_again_to_the_byte(backbone: str, tmp_path: Path) -> None:
    short = dataclasses.replace(STEP, rows=50, epochs=1)
    model, _ = ht.load_backbone(backbone)
    (first,) = adapt(model, backbone, TASK, (short,), folder=tmp_path)
    (tmp_path / first["key"] / continued_pretraining.WEIGHTS).write_bytes(b"half")
    torch.manual_seed(99)
    fresh, _ = ht.load_backbone(backbone)
    (again,) = adapt(fresh, backbone, TASK, (short,), folder=tmp_path)
    assert again["reused"] is False
    assert again["weights_sha256"] == first["weights_sha256"]


def test_two_steps_go_on_from_one_another_and_share_the_first(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = text_task([f"{text} w0" for text in sentences(200, 7)], ["never"])
    monkeypatch.setattr(continued_pretraining, "load_task", lambda name: domain)
    short = {"epochs": 1, "max_length": 16, "learning_rate": 5e-3, "batch_size": 16}
    only, _ = ht.load_backbone(backbone)
    (alone,) = adapt(only, backbone, TASK, (dapt("news", **short),), folder=tmp_path)
    both, _ = ht.load_backbone(backbone)
    first, second = adapt(both, backbone, TASK, (dapt("news", **short), tapt(**short)), folder=tmp_path)
    assert first == {**alone, "reused": True}
    assert (
        second["loss_before"] < alone["loss_before"] - 0.2
    )  # it starts where the first ended, head included
    assert second["fresh_head"] is True
    words = "embeddings.word_embeddings.weight"
    assert not torch.equal(base_of(only)[words], base_of(both)[words])


@pytest.mark.parametrize(
    "architecture", ["roberta", "mpnet", "distilbert", "albert", "electra", "modernbert"]
)
def test_other_architectures_adapt_too(architecture: str, tmp_path: Path) -> None:
    config = tiny_config(architecture, vocab_size=len(WORDS), pad_token_id=0)
    ht.backbone_from_config(config).base_model.save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    model, _ = ht.load_backbone(str(tmp_path / "backbone"))
    before = base_of(model)
    adapt(
        model,
        str(tmp_path / "backbone"),
        TASK,
        (dataclasses.replace(STEP, rows=20, epochs=1),),
        folder=tmp_path / "kept",
    )
    changed = {name for name, value in base_of(model).items() if not torch.equal(value, before[name])}
    assert {name for name in set(before) - changed if "pooler" not in name} <= {
        "embeddings.token_type_embeddings.weight"
    }


def test_what_cannot_be_pretrained_is_refused_by_name(tmp_path: Path, backbone: str) -> None:
    ht.backbone_from_config(tiny_config("gpt2", vocab_size=len(WORDS))).base_model.save_pretrained(
        tmp_path / "gpt2"
    )
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    model, _ = ht.load_backbone(str(tmp_path / "gpt2"))
    with pytest.raises(UnsupportedError, match="'gpt2' has no head 'masked-lm'"):
        adapt(model, str(tmp_path / "gpt2"), TASK, (STEP,), folder=tmp_path / "kept")
    plain = mask_tokenizer()
    plain.mask_token = None
    with pytest.raises(ArgumentError, match="has no mask token"):
        MaskedText(plain)
    attachment = ht.attach(tiny_bert(vocab_size=len(WORDS)), ht.HeadOnly())
    with pytest.raises(ArgumentError, match=r"before attach and a protocol without pretraining"):
        train(attachment, TASK, TOKENIZER, Protocol(pretraining=(tapt(),)))
    assert not (tmp_path / "kept").exists() or not [p for p in (tmp_path / "kept").iterdir() if p.is_dir()]


# specs, runs and records -------------------------------------------------------------------------------------------


def test_a_run_records_its_pretraining_and_can_be_restored(
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "data" / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for stem, split in (("train", "train"), ("dev", "test")):
        rows = TASK.splits[split].rename_column("text", "sentence")
        pq.write_table(rows.with_format("arrow")[:], folder / f"{stem}.parquet")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HADAMARD_CACHE", str(tmp_path / "cache"))
    steps = (tapt(epochs=1, max_length=16, learning_rate=5e-3, rows=40),)
    plain = RunSpec(backbone, "sst2", ht.Hadamard(), PROTOCOL)
    adapted = dataclasses.replace(plain, protocol=dataclasses.replace(PROTOCOL, pretraining=steps))
    store = RunStore(tmp_path / "runs")
    before, after = run(plain, store), run(adapted, store)
    assert "pretraining" not in before.info["meta_info"]
    (record,) = store.run(adapted.key).info["meta_info"]["pretraining"]
    assert (record["text"], record["rows"], record["reused"]) == ("task", 40, False)
    assert record["origin"][0]["task"] == "sst2"
    assert record["origin"][0]["files"]
    assert after.times["pretraining"] > 0
    other_seed = run(dataclasses.replace(adapted, seed=1), store)
    assert other_seed.info["meta_info"]["pretraining"][0]["reused"] is True
    table = store.load()
    assert set(table["pretraining"]) == {"", "task"}
    assert table.query("pretraining == 'task'")["label"].str.contains("after ContinuedPretraining").all()

    rows = TOKENIZER("w1 sun", return_tensors="pt")
    stored = store.run(adapted.key)
    with torch.no_grad():
        wanted = after.attachment.model(**rows).logits
        assert torch.equal(stored.restore()[0](**rows).logits, wanted)
        shutil.rmtree(tmp_path / "cache" / "pretraining")
        assert torch.equal(stored.restore()[0](**rows).logits, wanted)  # made again
    shutil.rmtree(tmp_path / "cache" / "pretraining")
    monkeypatch.setenv("HADAMARD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"is not in .*, and cannot be made again: task 'sst2' was not found"):
        stored.restore()


def test_kept_weights_are_read_where_nothing_can_be_written_and_new_ones_need_a_place(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, kept = text_task(sentences(40, 0), sentences(4, 1)), tmp_path / "kept"
    step = dataclasses.replace(STEP, epochs=1)
    adapt(ht.load_backbone(backbone)[0], backbone, task, [step], folder=kept)
    with read_only(kept):
        (record,) = adapt(ht.load_backbone(backbone)[0], backbone, task, [step], folder=kept)
        assert record["reused"] is True
        monkeypatch.setattr(continued_pretraining, "_pretrain", lambda *_: pytest.fail("trained for nothing"))
        with pytest.raises(
            DownloadError, match=r"cannot be written to \(Permission denied\); set HADAMARD_CACHE"
        ):
            adapt(ht.load_backbone(backbone)[0], backbone, task, [STEP], folder=kept)


def test_texts_of_any_language_keep_their_digest() -> None:
    digest = hashlib.sha256('["é", "日本"]'.encode()).hexdigest()
    assert continued_pretraining._sha256(["é", "日本"]) == digest
