"""The outputs of self-attention on the same texts before and after training."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from hadamard_toolkit.backbones import load_backbone
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.run import live
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.sites import Sites
from hadamard_toolkit.studies.attention_shift import (
    FITS,
    cka_biased,
    cka_debiased,
    means_by_example,
    norms_by_example,
    polynomial_fits,
)
from hadamard_toolkit.tasks.registry import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 80
BATCH = 16
SITE = "attention_output"
DIGITS = 6
COLUMNS = ["layer", "example", "tokens", "before", "after", "total", *FITS, "cka", "cka_biased", "cka_seeds"]
Outputs = list[np.ndarray]  # by layer, [tokens, width]
_HELD: OrderedDict[tuple[str, int], Outputs] = OrderedDict()  # outputs of the models of the last runs
_HOLD = 3


def attention(run: Run, store: RunStore, *, examples: int = EXAMPLES) -> pd.DataFrame:
    """Self-attention outputs (after W_O, before residual and norm) of the pretrained backbone and of `run`, compared.

    On the first `examples` test rows that `run` was scored on, in evaluation mode and float32, padding left out; before
    and after see the same tokens. A run whose weights were not kept is trained again (`live`).

    One row per layer and example: `tokens`, mean norms `before` and `after`; for the second half of the examples the
    columns of `studies.attention_shift.polynomial_fits`, fitted on the first half (`total`, `unchanged`, `linear`,
    `quadratic`, `cubic`; NaN for the first half); and, the same in all rows of a layer, the linear CKA of the examples'
    mean outputs before and after, debiased (`cka`) and not (`cka_biased`), and the debiased CKA of this run and the
    same spec with another seed (`cka_seeds`, the ceiling; NaN if the store has no such run). Raises `UnsupportedError`
    for span tasks.
    """
    if run.info["meta_info"]["task"]["head"] == "span":
        raise UnsupportedError(
            f"task {run.spec.task!r} is of kind 'span'; attention does single texts and pairs"
        )
    rows = run.predictions["test"]["rows"][:examples]
    own = run.info["meta_info"]["task"]
    model, tokenizer = load_backbone(
        run.spec.backbone, labels=own["labels"], head=own["head"], seed=run.spec.seed
    )
    batches = _batches(run, rows, tokenizer)
    group = _examples(batches)
    before = _outputs(model, batches)
    after = _outputs_of(run, batches)
    sibling = _sibling(run, store)
    again = None if sibling is None else _outputs_of(sibling, batches)
    halves = np.arange(group.max() + 1) < (group.max() + 1) // 2
    tables = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        old_means, new_means = means_by_example(old, group), means_by_example(new, group)
        ceiling = np.nan if again is None else cka_debiased(new_means, means_by_example(again[layer], group))
        fits = polynomial_fits(old, new, group, np.flatnonzero(halves)).set_index("example")
        table = pd.DataFrame(
            {
                "layer": layer,
                "example": np.arange(len(halves)),
                "tokens": np.bincount(group),
                "before": norms_by_example(old, group),
                "after": norms_by_example(new, group),
                "cka": cka_debiased(old_means, new_means),
                "cka_biased": cka_biased(old_means, new_means),
                "cka_seeds": ceiling,
            }
        )
        tables.append(table.join(fits))
    whole = pd.concat(tables, ignore_index=True)[COLUMNS]
    return whole.round(dict.fromkeys(COLUMNS[3:], DIGITS))


def _batches(run: Run, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    task = load_task(run.spec.task)
    chosen = task.splits["test"].select(rows)
    texts = [list(chosen[column]) for column in task.text_columns]
    return [
        dict(
            tokenizer(
                *(column[start : start + BATCH] for column in texts),
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=run.spec.protocol.max_length,
                return_tensors="pt",
            )
        )
        for start in range(0, len(rows), BATCH)
    ]


def _examples(batches: list[dict[str, Tensor]]) -> np.ndarray:
    """The example of every token except padding."""
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches]).numpy()
    return np.repeat(np.arange(len(lengths)), lengths)


def _outputs_of(run: Run, batches: list[dict[str, Tensor]]) -> Outputs:
    """Those of the trained model of `run`; the last few are kept, as a run also serves as the ceiling of another."""
    key = run.key, hash(tuple(batch["input_ids"].numpy().tobytes() for batch in batches))
    if key not in _HELD:
        _HELD[key] = _outputs(live(run)[0], batches)
        while len(_HELD) > _HOLD:
            _HELD.popitem(last=False)
    return _HELD[key]


def _outputs(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Outputs:
    """The attention outputs of every layer with adapters active, at all tokens except padding."""
    sites = Sites(model)
    collected: list[list[np.ndarray]] = [[] for _ in range(len(sites))]
    seen: list[Tensor] = [torch.empty(0)] * len(sites)

    def watch(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[layer] = output

        return sites(layer, SITE).module.register_forward_hook(hook)

    model.eval()
    handles = [watch(layer) for layer in range(len(sites))]  # behind those of the adapter, which came first
    try:
        with torch.inference_mode():
            for batch in batches:
                model(**{name: value.to(model.device) for name, value in batch.items()})
                real = batch["attention_mask"].bool()
                for layer, output in enumerate(seen):
                    collected[layer].append(output.float().cpu()[real].numpy())
    finally:
        for handle in handles:
            handle.remove()
    return [np.concatenate(parts) for parts in collected]


def _sibling(run: Run, store: RunStore) -> Run | None:
    """The run of the same spec with the lowest other seed."""
    record = run.spec.to_dict()
    table = store.load().drop_duplicates("key")
    alike = table[(table["task"] == run.spec.task) & (table["seed"] != run.spec.seed)].sort_values("seed")
    for key in alike["key"]:
        other = store.run(key)
        if {**other.spec.to_dict(), "seed": run.spec.seed} == record:
            return other
    return None
