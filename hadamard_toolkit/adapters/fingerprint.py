"""Which backbone an adapter was trained on: digests of its weights at every precision, and its config's settings."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hadamard_toolkit.errors import DataError

# From the most exact to the least. A model has a digest for its own precision and for those it can be rounded to.
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# Entries of a config that do not change what the weights compute: names, labels, special tokens, the length of the
# position table (the weights show it), initial values, dropout, and how the model runs and what it returns.
_NO_SETTINGS = re.compile(
    r"^_|^architectures$|^auto_map$|label|^num_labels$|^problem_type$|task|version|(?<!decoder_start)_token_id|"
    r"^max_position_embeddings$|initializer|drop|^dtype$|^output_|^return_dict$|^use_cache$|^tie_|"
    r"^chunk_size|^deterministic_|^pretraining_tp$|^quantization"
)


def describe_backbone(
    config: PreTrainedConfig, layers: int, parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a saved attachment says of its backbone, for `check_backbone`."""
    return {
        "name": config.name_or_path or None,
        "model_type": config.model_type,
        "layers": layers,
        "fingerprint": fingerprint(parameters),
        "settings": settings(config),
    }


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The entries of `config` that change what the same weights compute, such as `hidden_act`, as JSON values."""
    entries = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in entries.items() if not _NO_SETTINGS.search(name)}


def check_backbone(
    folder: object, record: Mapping[str, Any], config: PreTrainedConfig, parameters: Mapping[str, Tensor]
) -> None:
    """Raise `DataError` unless the `record` of a backbone, from the files in `folder`, fits this one.

    Settings that only one of the two has are not compared: other versions of `transformers` have other entries.
    """
    now = settings(config)
    for name, value in record.get("settings", {}).items():
        if name in now and now[name] != value:
            raise DataError(
                f"folder={str(folder)!r} was trained on another backbone: {name}={value!r} in its config, and this "
                f"model has {now[name]!r}; {_ADVICE}"
            )
    check_fingerprint(folder, record["fingerprint"], parameters)


_ADVICE = "load that backbone, or pass strict=False to transplant"


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of names, shapes and all values of the base model's `parameters`, by precision.

    Weights in float32 have one as they are and one for each half precision that they may be loaded in; a model in half
    precision (or with some of its weights in it) has one, so that the same weights are recognised wherever one of the
    two models was rounded from the other. On the meta device names and shapes alone count.
    """
    halves = {parameter.dtype for parameter in parameters.values()} & {torch.float16, torch.bfloat16}
    return {
        name: _digest(parameters, dtype)
        for name, dtype in PRECISIONS.items()
        if dtype in halves or not halves
    }


def first_values(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of files of format 1: the first 32 values of each tensor alone, in bfloat16."""
    digest = sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:32].to(torch.bfloat16).view(torch.int16)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(
    folder: object, expected: str | dict[str, str], parameters: Mapping[str, Tensor]
) -> None:
    """Raise `DataError` unless `expected`, from the files in `folder`, is the fingerprint of `parameters`."""
    if isinstance(expected, str):
        digest, compared = first_values(parameters), expected
        if digest == expected:
            warnings.warn(
                f"folder={str(folder)!r} was saved by an older version, which noted the first 32 values of each weight "
                "of its backbone: these are the same here, the others were not compared; save it again to note all",
                stacklevel=3,
            )
    else:
        ours = fingerprint(parameters)
        common = [name for name in PRECISIONS if name in ours and name in expected]
        if not common:
            raise DataError(
                f"folder={str(folder)!r} was trained on a backbone in {', '.join(expected)}, and this one is in "
                f"{', '.join(ours)}: their weights cannot be compared. Load it in {', '.join(expected)} or in "
                "float32, or pass strict=False to transplant"
            )
        digest, compared = ours[common[0]], expected[common[0]]
    if digest != compared:
        raise DataError(
            f"folder={str(folder)!r} was trained on another backbone (fingerprint {compared}, this model has "
            f"{digest}); {_ADVICE}"
        )


def _digest(parameters: Mapping[str, Tensor], precision: torch.dtype) -> str:
    digest = sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().flatten()
            if values.is_floating_point():
                values = values.to(precision)
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
