"""Masked-language modelling as a kind of task for the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.sparsity.batches import Batch
from hadamard_toolkit.training.batching import Examples, Source, mix
from hadamard_toolkit.training.evaluation import inputs_of
from hadamard_toolkit.training.task_types import Kind

NOT_CHOSEN = -100  # the label that the loss ignores
_EVALUATION = 3  # the part of the seed that governs the masks of evaluations


class MaskedText(Kind):
    """Masked-language modelling (Devlin et al. 2019).

    Each time a row is seen, a share of its tokens is chosen anew, special tokens never. Of these 80 % become [MASK],
    10 % a token drawn from the whole vocabulary, 10 % stay. Evaluations choose the same tokens every time. Predictions
    are float32 [rows, 2]: the summed loss of the chosen tokens, and their number. Raises `ArgumentError` for a
    tokenizer without a mask token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, share: float = 0.15, max_length: int = 128, seed: int = 0
    ) -> None:
        if tokenizer.mask_token is None:
            raise ArgumentError(
                f"{type(tokenizer).__name__} has no mask token, which masked-language modelling needs"
            )
        super().__init__(tokenizer, max_length)
        self.seed = seed
        self._masker = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=share)

    def encode(self, rows: Dataset) -> Examples:
        """The texts of column `text` as consecutive pieces of at most `max_length` tokens, special ones included."""
        encoded = self.tokenizer(
            list(rows["text"]),
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        encoded.pop("overflow_to_sample_mapping", None)
        readable = [piece for piece, special in enumerate(encoded["special_tokens_mask"]) if not all(special)]
        inputs = {key: [values[piece] for piece in readable] for key, values in encoded.items()}
        return Examples(inputs, np.zeros(len(readable), np.int64))

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        batch = super().collate(rows)
        special = batch.pop("special_tokens_mask").bool()  # padding is marked as special too
        ids, labels = self._masker.torch_mask_tokens(batch["input_ids"], special)
        if bool((labels == NOT_CHOSEN).all()):
            # In few short rows no token may be chosen, and a mean over none would not be a number.
            row, token = (~special).nonzero()[0].tolist()
            labels[row, token] = ids[row, token]
            ids[row, token] = self.tokenizer.mask_token_id
        return {**batch, "input_ids": ids, "labels": labels}

    def predict(
        self, accelerator: Accelerator, model: nn.Module, source: Source, batch_size: int
    ) -> np.ndarray:
        # The collator's own `seed` is no alternative: it refuses to work in a worker process of a sweep.
        self._masker.generator = torch.Generator().manual_seed(mix(self.seed, _EVALUATION))
        try:
            return super().predict(accelerator, model, source, batch_size)
        finally:
            self._masker.generator = None

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        chosen = labels != NOT_CHOSEN
        logits = model(**inputs_of(batch)).logits[chosen].float()
        losses = torch.zeros(labels.shape, device=labels.device)
        losses[chosen] = functional.cross_entropy(logits, labels[chosen], reduction="none")
        return torch.stack([losses.sum(1), chosen.sum(1).float()], dim=1)

    def score(self, names: Sequence[str], predictions: np.ndarray, rows: Any) -> dict[str, float]:
        total, chosen = predictions.astype(np.float64).sum(0)
        return {"loss": float(total / chosen)}
