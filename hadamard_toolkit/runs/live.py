"""A stored run as a working model again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hadamard_toolkit.errors import DataError
from hadamard_toolkit.runs.record import KEPT, Run
from hadamard_toolkit.runs.run import run as train_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hadamard_toolkit.adapters.attachment import Attachment

TOLERANCE = 1e-3  # of logits: another machine, another number of threads


def live(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Attachment]:
    """The trained model of `run`: (model, tokenizer, attachment), restored from its weights.

    Where the store has not kept them, the run is trained again in memory. Its test logits must then be the stored ones
    to 1e-3, as they are on the machine that made them; otherwise `DataError` says how far off they are.
    """
    from hadamard_toolkit.backbones import load_backbone

    if run.info["run_info"]["weights"] == KEPT:
        return run.restore()
    again = train_again(run.spec)
    assert again.attachment is not None
    for name in ("logits", "score"):
        if name in run.predictions["test"]:
            stored, found = run.predictions["test"][name], again.predictions["test"][name]
            off = float(np.abs(found - stored).max()) if stored.shape == found.shape else float("inf")
            if not off <= TOLERANCE:
                raise DataError(
                    f"run {run.key} was trained again and came out otherwise (test {name} differ by up to {off:.2g}); "
                    'do it anew with RunStore(folder, keep="adapters"), which keeps its weights'
                )
    _, tokenizer = load_backbone(run.spec.backbone, labels=run.info["meta_info"]["task"]["labels"])
    return again.attachment.model, tokenizer, again.attachment
