"""What adapters cost on a backbone, side by side, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from transformers import PreTrainedConfig

from hadamard_toolkit.adapters.attachment import attach
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.backbones import backbone_from_config


def parameter_counts(adapters: Mapping[str, Adapter], config: PreTrainedConfig) -> pd.DataFrame:
    """The parameters of each adapter on a backbone of `config`, heads left out; one row per name.

        parameter_counts({"LoRA": LoRA(), "Hadamard": Hadamard()}, BertConfig())

    Columns: `sites` (where modules are inserted, in words), `trained`, `stored` and `nonzero` as in `Attachment.count`,
    summed over adapter, norm and gate; `gates` (those stored); `% trained` and `% stored`, shares of the backbone's
    own parameters. Models are built on the meta device: shapes without weights.
    """
    rows = {}
    for name, adapter in adapters.items():
        with torch.device("meta"):
            model = backbone_from_config(config)
        whole = sum(parameter.numel() for parameter in model.base_model.parameters())
        attachment = attach(model, adapter)
        counts = attachment.count().drop(index="head")
        sites = dict.fromkeys(insertion.site.name for insertion in attachment.insertions.values())
        total = counts.sum()
        rows[name] = {
            "sites": ", ".join(sites) or "–",
            **total,
            "gates": counts.loc["gate", "stored"],
            "% trained": 100 * total["trained"] / whole,
            "% stored": 100 * total["stored"] / whole,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
