"""Tokenizers of backbones: whole, and those of their model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hadamard_toolkit.backbones import backbone_from_config, load_backbone
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.vocabulary import make_agree
from tests.architectures import ARCHITECTURES, tiny_config
from tests.test_backbones import save_with
from tests.training.tiny import tiny_tokenizer

Minilm = Callable[..., tuple[Any, Any]]


@pytest.fixture
def folder(tmp_path: Path, minilm: Minilm) -> Path:
    """A local folder with a tiny encoder and MiniLM's tokenizer."""
    target = tmp_path / "tiny"
    config = tiny_config("bert", vocab_size=30522)
    backbone_from_config(config, head="masked-lm").save_pretrained(target)
    minilm()[1].save_pretrained(target)
    return target


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_backbone_without_its_tokenizer_is_refused(architecture: str, tmp_path: Path) -> None:
    backbone_from_config(tiny_config(architecture, eos_token_id=2)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer: .*missing (is|are) tokenizer\.json"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "files", "missing"),
    [
        ("roberta", {"vocab.json": '{"<s>": 0, "a": 1}'}, "tokenizer.json and merges.txt"),
        ("roberta", {"merges.txt": "a b"}, "tokenizer.json and vocab.json"),
        (
            "bert",
            {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
            "tokenizer.json and vocab.txt",
        ),
    ],
)
def test_a_tokenizer_of_which_a_part_is_missing_is_refused(
    architecture: str, files: dict[str, str], missing: str, tmp_path: Path
) -> None:
    backbone_from_config(tiny_config(architecture)).save_pretrained(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"tokenizer: .*missing are {missing}"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty tokenizer"), ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "empty tokenizer")],
)
def test_a_tokenizer_without_words_is_refused(text: str, message: str, tmp_path: Path) -> None:
    backbone_from_config(tiny_config("bert")).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_backbone(str(tmp_path))


def test_a_vocabulary_alone_is_a_tokenizer(tmp_path: Path) -> None:
    backbone_from_config(tiny_config("bert")).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n")
    assert load_backbone(str(tmp_path))[1]("good")["input_ids"] == [2, 5, 3]


def test_a_damaged_tokenizer_is_one_clear_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version":')
    with pytest.raises(DataError, match="has no readable tokenizer: "):
        load_backbone(str(folder))


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    model, tokenizer = backbone_from_config(tiny_config("bert")), tiny_tokenizer()
    tokenizer.add_tokens(
        [f"new{number}" for number in range(41)]
    )  # 20 of its own: ids up to 60, for 60 embeddings
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"token 'new40' has id 60, .*ids below 60.*resize_token_embeddings\(61\)"
    ):
        load_backbone(str(tmp_path))
    model.resize_token_embeddings(61)
    model.save_pretrained(tmp_path)
    load_backbone(str(tmp_path))


@pytest.mark.parametrize("pad", ["[PAD]", "[UNK]", None])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_last_token_is_found_whatever_pads(architecture: str, pad: str | None, tmp_path: Path) -> None:
    save_with(backbone_from_config(tiny_config(architecture, pad_token_id=5, eos_token_id=2)), tmp_path, {})
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_backbone(str(tmp_path))
    assert model.config.pad_token_id == tokenizer.pad_token_id == {"[PAD]": 0, "[UNK]": 3, None: 5}[pad]
    rows = ["a day", "a very bright film and so the plot was warm"]
    with torch.no_grad():
        together = model(**tokenizer(rows, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer([row], return_tensors="pt")).logits for row in rows]
    torch.testing.assert_close(together, torch.cat(alone))


def test_another_padding_id_is_refused_where_positions_are_counted_from_it(tmp_path: Path) -> None:
    save_with(backbone_from_config(tiny_config("roberta", pad_token_id=1)), tmp_path, {})
    with pytest.raises(
        DataError, match=r"pads with '\[PAD\]' \(id 0\).*padding id 1.*pad_token to '\[CLS\]'"
    ):
        load_backbone(str(tmp_path))


def test_a_tokenizer_whose_tokens_are_characters_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", dict)
    model = backbone_from_config(tiny_config("bert"))
    make_agree(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
