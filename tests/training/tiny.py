"""A tiny tokenizer and a tiny task that can be learned, for the tests of training."""

from __future__ import annotations

import random
from typing import Any

from datasets import DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hadamard_toolkit as ht
from hadamard_toolkit.tasks.base import Task, in_memory
from tests.architectures import tiny_config

GOOD, BAD = ["fine", "bright", "warm"], ["dull", "grim", "cold"]
FILLER = ["a", "the", "film", "day", "was", "very", "and", "so", "it", "plot"]
_SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]  # 2 is the end-of-sequence id of the tiny configs


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; `[CLS] a [SEP]` and `[CLS] a b [SEP]`, so that every row has one end token."""
    words = {word: index for index, word in enumerate([*_SPECIAL, "[UNK]", *GOOD, *BAD, *FILLER])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _rows(count: int, kind: str, seed: int) -> dict[str, list[Any]]:
    random_ = random.Random(seed)
    texts, labels = [], []
    for row in range(count):
        label = row % 2
        words = random_.choices(FILLER, k=random_.randint(2, 12)) + random_.choices(
            GOOD if label else BAD, k=2
        )
        random_.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label if kind == "classification" else float(label))
    return {"text": texts, "label": labels}


def tiny_task(kind: str = "classification", *, train: int = 96, test: int = 40, **splits: int) -> Task:
    """Good words or bad words? `splits` adds further splits, e.g. `validation=20`."""
    counts = {"train": train, "test": test, **splits}
    data = DatasetDict(
        {name: in_memory(_rows(n, kind, seed)) for seed, (name, n) in enumerate(counts.items())}
    )
    if kind == "regression":
        return Task("tiny", data, ("text",), kind, (), "pearson", metrics=("pearson", "spearman"))
    return Task("tiny", data, ("text",), kind, ("bad", "good"), "accuracy", metrics=("accuracy", "f1"))


def tiny_bert(*, seed: int = 0, head: str = "classification", **changes: Any) -> PreTrainedModel:
    """A random BERT of three layers, its weights wide enough for rows to differ."""
    config = tiny_config("bert", **{"initializer_range": 0.2, **changes})
    return ht.backbone_from_config(config, head=head, seed=seed)
