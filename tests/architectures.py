"""One tiny random config for every architecture that the toolkit supports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import hadamard_toolkit as ht

_COMMON = {"vocab_size": 60, "pad_token_id": 0}
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_SHAPES: dict[str, dict[str, object]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 8},
    "deberta": {**_BERT, **_DEBERTA, "type_vocab_size": 0, "pooler_hidden_size": 16},
    "deberta-v2": {**_BERT, **_DEBERTA, "type_vocab_size": 0, "pooler_hidden_size": 16},
    "mpnet": _BERT,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    "albert": {**_BERT, "embedding_size": 8},
    "modernbert": {**_BERT, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
    "bart": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 40,
        "eos_token_id": 2,
    },
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40},
    "llama": {**_BERT, "num_key_value_heads": 1},
}
ARCHITECTURES = tuple(_SHAPES)


def tiny_config(architecture: str, **changes: object) -> PretrainedConfig:
    """Three layers of width 16 over 60 tokens."""
    return AutoConfig.for_model(architecture, **{**_COMMON, **_SHAPES[architecture], **changes})


def tiny_model(architecture: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A classifier of that config in eval mode, its norms and biases moved off their trivial values."""
    model = ht.backbone_from_config(tiny_config(architecture, **changes), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_batch(rows: int = 3, length: int = 9, *, seed: int = 0) -> dict[str, Tensor]:
    """Token ids that end in the eos token 2, with one padded row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    ids[0, length - 3 :], mask[0, length - 2 :] = 0, 0
    ids[0, length - 3] = 2
    return {"input_ids": ids, "attention_mask": mask}


def tiny_basis(
    seed: int = 0, *, sites: Sequence[str] = ("attention_output",), directions: int = 8, scale: float = 1.0
) -> str:
    """The name of a saved basis for weight and bias at `sites` in three layers: orthonormal rows times `scale`."""
    names = [
        f"layers.{layer}.{site}.{part}" for layer in range(3) for site in sites for part in ("weight", "bias")
    ]
    drawn = np.random.default_rng(seed).normal(size=(16 * len(names), directions))
    rows = scale * np.linalg.qr(drawn)[0].T
    pieces = np.split(rows.astype(np.float32), len(names), axis=1)
    return ht.save_basis(dict(zip(names, pieces, strict=True)), kind="random", seed=seed)
