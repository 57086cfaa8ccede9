"""Whether a tokenizer is whole, and whether its ids are those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hadamard_toolkit.errors import DataError

WHOLE = "tokenizer.json"
BY_PAIRS = ("vocab.json", "merges.txt")  # neither is of use without the other


def read_tokenizer(name: str, source: str, folder: Path, *, offline: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of backbone `name`: `source` is its folder or hub id, `folder` where its files lie once loaded.

    Raises `DataError` unless the files that it is made of are there and hold words. Without them `transformers` may
    give a tokenizer of a few special tokens, for which every word is unknown.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, local_files_only=offline, trust_remote_code=False
        )
    except Exception as error:  # those who read tokenizer files have no error class of their own
        reason = str(error).strip().partition("\n")[0]
        paired = BY_PAIRS if any((folder / file).is_file() for file in BY_PAIRS) else ()
        if not (folder / WHOLE).is_file():
            reason = f"missing {_are(_lacking(folder, paired))} ({reason})"
        raise DataError(f"backbone {name!r} has no readable tokenizer: {reason}. {_REMEDY}") from error
    names = {part: file for part, file in tokenizer.vocab_files_names.items() if part != "tokenizer_file"}
    needed = [names[part] for part in ("vocab_file", "merges_file") if part in names] or list(names.values())
    if needed and len(lacking := _lacking(folder, needed)) > 1 and not (folder / WHOLE).is_file():
        raise DataError(
            f"backbone {name!r} has no whole tokenizer: {type(tokenizer).__name__} needs {WHOLE}, or else "
            f"{' and '.join(needed)}; missing {_are(lacking)}. {_REMEDY}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(f"backbone {name!r} has an empty tokenizer: its files hold no words. {_REMEDY}")
    return tokenizer


_REMEDY = "Save it beside the model (tokenizer.save_pretrained), or fetch the backbone again"


def _lacking(folder: Path, needed: Sequence[str]) -> list[str]:
    return [WHOLE, *(file for file in needed if not (folder / file).is_file())]


def _are(files: Sequence[str]) -> str:
    return f"{'is' if len(files) == 1 else 'are'} {' and '.join(files)}"


def make_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `model` pad as `tokenizer` does, or raise `DataError` where the two do not belong together.

    A head that looks for the last token finds it by the padding id in the model's config, which becomes that of the
    tokenizer. Refused are ids that have no embedding, and another padding id where positions are counted from it.
    """
    vocabulary, room = tokenizer.get_vocab(), _room(model)
    last = max(vocabulary, key=vocabulary.__getitem__, default=None)  # None where characters are the tokens
    if room is not None and last is not None and vocabulary[last] >= room:
        raise DataError(
            f"the tokenizer does not fit the model: its token {last!r} has id {vocabulary[last]}, and "
            f"{type(model).__name__} has embeddings for ids below {room}. Give the tokenizer that belongs to the "
            f"model, or call model.resize_token_embeddings({vocabulary[last] + 1}) first"
        )
    pad, own = tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)
    if pad is None or pad == own:
        return
    if own is not None and any(map(_counts_from_padding, model.base_model.modules())):
        raise DataError(
            f"the tokenizer does not fit the model: it pads with {tokenizer.pad_token!r} (id {pad}), and "
            f"{type(model).__name__} counts positions from its own padding id {own}. Set tokenizer.pad_token to "
            f"{tokenizer.convert_ids_to_tokens(own)!r}"
        )
    model.config.pad_token_id = pad


def choose_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token that of the model, or else its end token."""
    if tokenizer.pad_token is None:
        own, room = getattr(model.config, "pad_token_id", None), _room(model) or 0
        known = tokenizer.convert_ids_to_tokens(own) if isinstance(own, int) and 0 <= own < room else None
        tokenizer.pad_token = known or tokenizer.eos_token


def _counts_from_padding(module: nn.Module) -> bool:
    return hasattr(module, "create_position_ids_from_inputs_embeds")


def _room(model: PreTrainedModel) -> int | None:
    """How many ids have an embedding; None for a model that embeds something else."""
    embeddings: nn.Module | None = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None)
