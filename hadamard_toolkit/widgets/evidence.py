"""What is known of each part of an adapter before anything is switched, and what keeping some of them costs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.hadamard import IDENTITY, HadamardVectors
from hadamard_toolkit.adapters.parts import LayerSite, Part, only, parts_of
from hadamard_toolkit.errors import ToolkitError


def evidence_table(attachment: Attachment) -> pd.DataFrame:
    """One row per layer and site: how far training moved it, and what of it is left by masks.

    Columns: `layer`, `site`; `weight` = ‖W − 1‖ and `bias` = ‖b‖ of Hadamard vectors (b without its mean where a norm
    behind it subtracts that; gain and bias of a norm count from their values before training), NaN for other parts;
    `importance` = √(weight² + bias²), for other parts the norm of all parameters, which says less; `density` = share of
    entries that masks keep (1 without masks); `trained` = number of parameters.
    """
    after = attachment.state_dict()
    with only(attachment, ()):
        before = attachment.state_dict()
    rows = [_row(attachment, place, part, after, before) for place, part in parts_of(attachment).items()]
    return pd.DataFrame(rows, columns=["layer", "site", "weight", "bias", "importance", "density", "trained"])


def _row(
    attachment: Attachment, place: LayerSite, part: Part, after: dict, before: dict
) -> dict[str, object]:
    named = _named(attachment, part)
    vectors = {"weight": float("nan"), "bias": float("nan")}
    hadamard = [attachment.insertions[label] for label in part.insertions]
    squares = 0.0
    for name in named:
        value, kind = after[name].double().numpy(), name.rpartition(".")[2]
        if any(name.endswith(f".{label}") for label in part.tunings):
            moved = value - before[name].double().numpy()
        elif kind in IDENTITY and all(
            isinstance(insertion.module, HadamardVectors) for insertion in hadamard
        ):
            moved = value - IDENTITY[kind]
            if kind == "bias" and place[1] == "attention_output" and attachment.sites.post_norm(place[0]):
                moved = moved - moved.mean()
        else:
            moved, kind = value, ""
        if kind in vectors and value.ndim == 1:
            vectors[kind] = float(np.sqrt(np.nansum([vectors[kind] ** 2, (moved**2).sum()])))
        squares += float((moved**2).sum())
    removed = attachment.masking.removed() if attachment.masking else {}
    entries = sum(after[name].numel() for name in named)
    kept = entries - sum(removed.get(name, 0) for name in named)
    importance = {"importance": float(np.sqrt(squares)), "density": kept / entries if entries else 1.0}
    return {"layer": place[0], "site": place[1], **vectors, **importance, "trained": entries}


def _named(attachment: Attachment, part: Part) -> list[str]:
    """Names of the parameters of a part."""
    own = {id(p) for label in part.insertions for p in attachment.insertions[label].module.parameters()}
    return [
        name
        for name, parameter in attachment.named_parameters().items()
        if id(parameter) in own or name.partition(".")[2] in part.tunings
    ]


def cost_table(attachment: Attachment, kept: Collection[LayerSite]) -> pd.Series:
    """What the parts at `kept` (and whatever is outside the layers) cost; the head is left out, as everywhere.

    `trained`, `stored`: parameters. `of_full`: share of the trained ones with everything kept. `multiply_adds`: per
    token, beside the backbone, while the adapter is not merged (one per entry of a matrix, vector or scale that is not
    an added bias). `backbone`: those of the backbone's own matrices in its layers. `merges`: whether what is kept
    folds into the backbone, so that inference costs nothing more.
    """
    parts, removed = parts_of(attachment), attachment.masking.removed() if attachment.masking else {}
    switched_off = {
        name for place, part in parts.items() if place not in kept for name in _named(attachment, part)
    }
    counted = {n: p for n, p in attachment.named_parameters().items() if not n.startswith("head.")}
    stored = {n: v.numel() for n, v in attachment.stored_state().items() if not n.startswith("head.")}
    on = {name: p for name, p in counted.items() if name not in switched_off}
    off_labels = {label for place, part in parts.items() if place not in kept for label in part.insertions}
    live = {label: i for label, i in attachment.insertions.items() if label not in off_labels}
    sites = attachment.sites
    matrices = sum(
        p.numel() for index in range(len(sites)) for p in sites.layer(index)[1].parameters() if p.ndim >= 2
    )
    work = sum(
        p.numel() for i in live.values() for n, p in i.module.named_parameters() if not n.endswith("bias")
    )
    return pd.Series(
        {
            "trained": sum(p.numel() for p in on.values()),
            "stored": sum(stored[n] - removed.get(n, 0) for n in stored if n not in switched_off),
            "of_full": sum(p.numel() for p in on.values()) / max(1, sum(p.numel() for p in counted.values())),
            "multiply_adds": work,
            "backbone": matrices,
            "merges": all(_folds(insertion) for insertion in live.values()),
        },
        dtype=object,
    )


def _folds(insertion: object) -> bool:
    try:
        insertion.module.check_fold(insertion.site)  # type: ignore[attr-defined]
    except ToolkitError:
        return False
    return True
