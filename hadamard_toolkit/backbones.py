"""Pretrained encoders as plain `transformers` models: pinned ones from the package registry, hub ids, local folders."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from hadamard_toolkit.downloads import checked_sha256
from hadamard_toolkit.errors import (
    ArgumentError,
    DataError,
    ToolkitError,
    UnsupportedError,
    check_choice,
    check_whole,
    suggestion,
)
from hadamard_toolkit.paths import folder_of, prepared_place
from hadamard_toolkit.pinned import PINNED, pinned_folder
from hadamard_toolkit.vocabulary import choose_padding, make_agree, read_tokenizer

_AUTO: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "span": AutoModelForQuestionAnswering,
    "masked-lm": AutoModelForMaskedLM,
}
HEADS = tuple(_AUTO)


def load_backbone(
    name: str = "minilm-l6", *, labels: int = 2, head: str = "classification", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model with a fresh head, and its tokenizer.

    `name` is a pinned backbone (`minilm-l6`, `mpnet-base`: downloaded once, SHA-256 checked at every load), a
    local folder, or a hub id. `head` is one of `HEADS`; `labels` counts for `classification` only (regression has
    one output, a span two). The model is in float32 and evaluation mode. The same `seed` gives the same head, byte
    for byte, and the global random state is neither used nor changed. Weights are read from safetensors only; no
    remote code is run.

    Raises `ArgumentError` for a bad `name`, `labels` or `head`, `UnsupportedError` where the architecture has no
    such head, `DownloadError` for a pinned file that is damaged or out of reach, `DataError` for weights that do
    not fit or that the architecture does not use, and for a tokenizer that lacks files or has ids of another model.
    """
    check_choice("head", head, HEADS)
    _check_labels(labels, head)
    source, offline = _source(name)
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise _unreachable(name, offline, error) from error
        _set_head(config, head, labels)
        auto = _auto_class(config, head)
        try:
            with seeded(seed):
                model, report = auto.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    # a stored head for other labels is replaced below
                    ignore_mismatched_sizes=head != "masked-lm",
                    output_loading_info=True,
                    local_files_only=offline,
                    trust_remote_code=False,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"backbone {name!r} cannot be loaded (it needs config.json, safetensors weights and tokenizer files; "
                f"nothing is ever unpickled): {_first_line(error)}"
            ) from error
        folder = Path(source) if offline else _hub_snapshot(name)
        tokenizer = read_tokenizer(name, source, folder, offline=offline)
    _check_complete(name, model, report)
    _check_used(name, model, report["unexpected_keys"])
    if head != "masked-lm":
        _renew_head(model, set(report["missing_keys"]), seed)
    choose_padding(model, tokenizer)
    try:
        make_agree(model, tokenizer)
    except DataError as error:
        raise DataError(f"backbone {name!r}: {error}") from None
    _set_padding(model)
    return model.eval(), tokenizer


def backbone_from_config(
    config: PreTrainedConfig, *, labels: int = 2, head: str = "classification", seed: int = 0
) -> PreTrainedModel:
    """A randomly initialised model of `config`, which is left as it is; also under `torch.device("meta")`.

    Arguments and errors as in `load_backbone`. The model is in evaluation mode.
    """
    check_choice("head", head, HEADS)
    _check_labels(labels, head)
    config = copy.deepcopy(config)
    _set_head(config, head, labels)
    auto = _auto_class(config, head)
    with _quiet(), seeded(seed):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    _set_padding(model)
    return model.eval()


def backbone_provenance(name: str) -> dict[str, Any]:
    """What a record must say of a backbone: name, source, revision, SHA-256 of each weights file, note.

    Of one that is not pinned also `files`: hashes of config and vocabulary, of what they say and not of how it is laid
    out. For a hub id the weights must have been loaded before (they are read from the hub's local cache).
    """
    if name in PINNED:
        pinned = PINNED[name]
        packages = ", ".join(f"{part.project} {part.version}" for part in pinned.distributions)
        return {
            "name": name,
            "source": f"{pinned.source} (package {packages})",
            "revision": None,
            "sha256": {
                file: digest for file, digest in pinned.files.items() if file.endswith(".safetensors")
            },
            "licence": pinned.licence,
            "note": pinned.note,
        }
    folder, hub = backbone_folder(name), is_hub_id(name)
    return {
        "name": name if hub else Path(name).name,
        "source": "hub" if hub else "local folder",
        "revision": folder.name if hub else None,
        "sha256": {file.name: checked_sha256(file) for file in sorted(folder.glob("*.safetensors"))},
        "files": _meanings(folder),
        "licence": None,
        "note": "",
    }


def backbone_folder(name: str) -> Path:
    """Where the files of a backbone lie; those of a hub id must have been loaded before."""
    source, local = _source(name)
    return Path(source) if local else _hub_snapshot(name)


def is_hub_id(name: str) -> bool:
    """Whether `name` is neither a pinned backbone nor a folder. A prepared folder stands for one by its full path."""
    return name not in PINNED and folder_of(name) is None and not os.path.isabs(name)


# What these files say besides what the model computes: who wrote them, settings of the head, which is always a fresh
# one, and settings that every call of a tokenizer makes anew.
NOT_THE_BACKBONE = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type"),
    "transformers_version",
}
_IGNORED = {
    "config.json": NOT_THE_BACKBONE,
    "tokenizer.json": {"padding", "truncation"},
    "tokenizer_config.json": {
        *("added_tokens_decoder", "auto_map", "backend", "chat_template", "clean_up_tokenization_spaces"),
        *("is_local", "max_length", "model_max_length", "name_or_path", "pad_to_multiple_of", "padding_side"),
        *("processor_class", "special_tokens_map_file", "stride", "tokenizer_file", "transformers_version"),
        "truncation_strategy",
    },
}
_VOCABULARIES = {"vocab.txt", "vocab.json", "merges.txt"}
# Read where they are, and with a meaning where they are not, so that one that comes or goes is a difference.
_SPECIAL = ("special_tokens_map.json", "added_tokens.json")


def _meanings(folder: Path) -> dict[str, str]:
    """SHA-256 of what config and tokenizer in `folder` say, and of its vocabulary files."""
    digests = dict.fromkeys(_SPECIAL, "not there")
    for name, ignored in {**_IGNORED, **dict.fromkeys(_SPECIAL, frozenset[str]())}.items():
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text("utf-8"))
            meaning = {key: value for key, value in settings.items() if key not in ignored}
            digests[name] = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    for path in sorted(folder.iterdir()):
        if path.name in _VOCABULARIES or path.suffix == ".model":
            digests[path.name] = checked_sha256(path)
    return digests


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch generators seeded by `seed` inside the block; outside, their states are as if it had not run."""
    # torch.manual_seed would also queue a seed for a GPU that is not initialised yet, and so leak out of the block.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bar, and no report of the fresh head (`_check_complete` tells a fresh head from lost weights)."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_labels(labels: int, head: str) -> None:
    check_whole("labels", labels, least=2 if head == "classification" else 1)


def _source(name: str) -> tuple[str, bool]:
    """What `from_pretrained` reads, and whether it lies on this machine."""
    if (prepared := prepared_place("backbones", name)) is not None:
        return str(next(prepared.iterdir())), True
    if name in PINNED:
        return str(pinned_folder(name)), True
    if (folder := folder_of(name)) is not None:
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise DataError(
                f"folder {name!r} is no backbone: it needs config.json and *.safetensors weights "
                "(a pytorch_model.bin is never unpickled; save it again with save_pretrained)"
            )
        return str(folder), True
    return name, False


def _unreachable(name: str, offline: bool, error: Exception) -> ToolkitError:
    if offline:
        return DataError(f"backbone {name!r} has no readable config.json: {_first_line(error)}")
    return ArgumentError(
        f"name={name!r} is not allowed: it is no pinned backbone ({', '.join(map(repr, PINNED))}), no local folder, "
        f"and no hub id within reach (the hub answered: {_first_line(error)}).{suggestion(name, PINNED)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _set_head(config: PreTrainedConfig, head: str, labels: int) -> None:
    if head == "classification":
        config.num_labels, config.problem_type = labels, "single_label_classification"
    elif head == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif head == "span":
        config.num_labels = 2


def _auto_class(config: PreTrainedConfig, head: str) -> Any:
    auto = _AUTO[head]
    if type(config) not in auto._model_mapping:
        raise UnsupportedError(f"architecture {config.model_type!r} has no head {head!r} in transformers")
    return auto


def _check_complete(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Only the head, and a pooler where the checkpoint has none, may be fresh."""
    prefix = f"{model.base_model_prefix}."
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    lost = [key for key in report["missing_keys"] if ".pooler." not in key]
    wrong = sorted(key for key in {*lost, *mismatched} if key.startswith(prefix))
    if wrong:
        raise DataError(
            f"backbone {name!r} lacks {len(wrong)} weights of its architecture, the first {wrong[0]!r}"
        )


def _check_used(name: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Heads for other tasks and poolers may be left out; what lies inside the backbone must have a place in it."""
    prefix, parts = f"{model.base_model_prefix}.", dict(model.base_model.named_children())
    lost = []
    for key in sorted(unused):
        inner = key.removeprefix(prefix)
        inside = inner != key or inner.partition(".")[0] in (*parts, _ATTACHED)
        if inside and not _OLD_BUFFERS.search(key):
            lost.append(key)
    if not lost:
        return
    if any(key.startswith(f"{_ATTACHED}.") for key in lost):
        reason = "it was saved with its adapter still on; take that off first (attachment.save and detach, or merge)"
    elif all(key.endswith(".bias") for key in lost):
        reason = (
            "such biases are what merging an adapter adds; use the adapter's own folder (attachment.save)"
        )
    else:
        reason = "config.json may be another model's, or say too few layers"
    raise DataError(
        f"backbone {name!r} holds {len(lost)} tensors that {type(model).__name__} does not use, the first {lost[0]!r}: "
        f"{reason}"
    )


_ATTACHED = "hadamard_attachment"  # what an attached adapter is called in its model

# Poolers that the head leaves out, and constants that older versions of transformers kept among the weights.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(pooler\.|position_ids$|token_type_ids$|version$|masked_bias$|h\.\d+\.attn\.bias$|.*inv_freq$)"
)


def _renew_head(model: PreTrainedModel, fresh: set[str], seed: int) -> None:
    """A checkpoint that brings a task head of its own gets a fresh one, drawn from `seed`, like every other."""
    prefix = f"{model.base_model_prefix}."
    if all(name in fresh for name, _ in model.named_parameters() if not name.startswith(prefix)):
        return
    with seeded(seed):
        drawn = type(model)(model.config).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(prefix):
                parameter.copy_(drawn[name])


def _set_padding(model: PreTrainedModel) -> None:
    """Give decoder-only models the padding id by which they find the last token."""
    # Only after the model is built: a padding id known earlier would zero that token's embedding.
    if getattr(model.config, "pad_token_id", None) is None:
        end = getattr(model.config, "eos_token_id", None)
        known = isinstance(end, int) and end < model.config.vocab_size
        model.config.pad_token_id = end if known else 0


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise ArgumentError(
            f"name={name!r} is no pinned backbone, no local folder, and not in the hub's local cache"
        )
    return Path(found).parent
