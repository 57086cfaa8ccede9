"""Presets: `ht.protocols.hadamard()` and its siblings. Each takes changes: `hadamard(epochs=3)`."""

from __future__ import annotations

from typing import Any

from hadamard_toolkit.training.pretraining_step import ContinuedPretraining
from hadamard_toolkit.training.protocol import Protocol

__all__ = ["dapt", "full_fine_tuning", "hadamard", "smoke", "sparse_adapter", "squad", "tapt", "unipelt"]


def hadamard(**changes: Any) -> Protocol:
    """Two stages: the head first on cached features, then frozen while the adapter and its norm train.

    The stages are those of Chen et al. 2023; the paper's hyper-parameters are not known to us. The numbers are our
    own, picked from a handful tried with one seed on 3,000 rows of SST-2 with `minilm-l6`, and tuned no further.
    Whoever picked them saw the official dev scores beside those of the held-out rows, so SST-2 dev is not untouched.
    """
    settings: dict[str, Any] = {
        "head": "first-then-frozen",
        "learning_rate": 5e-3,
        "epochs": 6,
        "head_learning_rate": 2e-2,
        "head_epochs": 30,
        "weight_decay": 0.0,
        "warmup": 0.1,
    }
    return Protocol(**(settings | changes))


def full_fine_tuning(**changes: Any) -> Protocol:
    """One stage, everything trained together at a rate that a whole backbone bears, as many epochs as `hadamard`."""
    settings: dict[str, Any] = {"head": "trained", "learning_rate": 1e-4, "epochs": 6, "warmup": 0.1}
    return Protocol(**(settings | changes))


def sparse_adapter(**changes: Any) -> Protocol:
    """One stage with a trained head, after the run configurations of SparseAdapter's authors (He et al. 2022).

    Batch 48, learning rate 1e-4, 20 epochs, weight decay 0.1, Adam (0.9, 0.98, 1e-6), 6 % warm-up, clipping at
    1, linear decay, best epoch. Their code leaves the head frozen at random: `sparse_adapter(head="frozen-random")`.
    """
    settings: dict[str, Any] = {
        "head": "trained",
        "learning_rate": 1e-4,
        "epochs": 20,
        "batch_size": 48,
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "epsilon": 1e-6,
        "warmup": 0.06,
        "clip": 1.0,
        "schedule": "linear",
    }
    return Protocol(**(settings | changes))


def unipelt(k: int | None = None, **changes: Any) -> Protocol:
    """UniPELT's set-up (Mao et al. 2022): K training rows, 1,000 further ones to select on, the dev set as test.

    Batch 16, learning rate 5e-4, 50 epochs, patience 10, 128 tokens. `k` is 100, 500 or 1,000 in the paper; None
    trains on all rows that are left.
    """
    settings: dict[str, Any] = {
        "head": "trained",
        "learning_rate": 5e-4,
        "epochs": 50,
        "batch_size": 16,
        "max_length": 128,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "patience": 10,
        "train_rows": k,
        "validation_rows": 1000,
    }
    return Protocol(**(settings | changes))


def smoke(**changes: Any) -> Protocol:
    """The two stages on a few rows, in seconds on a CPU: it shows that things work, not how well."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "head_epochs": 10,
        "max_length": 64,
        "batch_size": 16,
        "train_rows": 192,
        "validation_rows": 64,
        "test_rows": 128,
    }
    return hadamard(**(settings | changes))


def squad(**changes: Any) -> Protocol:
    """One stage on SQuAD with the settings of BERT's own script (Devlin et al. 2019), for full fine-tuning.

    Windows of 384 tokens that share 128, batch 12, learning rate 3e-5, 2 epochs, 10 % warm-up. An adapter needs a
    higher rate: `squad(learning_rate=5e-4)`.
    """
    settings: dict[str, Any] = {
        "head": "trained",
        "learning_rate": 3e-5,
        "epochs": 2,
        "batch_size": 12,
        "max_length": 384,
        "stride": 128,
        "warmup": 0.1,
    }
    return Protocol(**(settings | changes))


def dapt(domain: str, **changes: Any) -> ContinuedPretraining:
    """Domain-adaptive pretraining, a step for `pretraining`: `hadamard(pretraining=(dapt("news"), tapt()))`."""
    return ContinuedPretraining(text=domain, **changes)


def tapt(**changes: Any) -> ContinuedPretraining:
    """Task-adaptive pretraining on the task's own training text, a step for `pretraining`."""
    return ContinuedPretraining(**changes)
