"""BERT written out from its formulas, without modules, hooks or fused kernels: what adapters are checked against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from tests.adapters.test_attachment import shake
from tests.architectures import tiny_batch, tiny_model

# place in the layer -> function of (layer, what is there, what was read to make it), giving what shall be there
Changes = dict[str, Callable[[int, Tensor, Tensor], Tensor]]


def bert_by_formula(
    weights: dict[str, Tensor], heads: int, batch: dict[str, Tensor], changes: Changes
) -> Tensor:
    """Logits of a BERT classifier with these `weights` (its state dict), changed at named places of every layer.

    Places: query, key, value, attention_output, ffn_inner, ffn_hidden, ffn_output; `beside_ffn`, where the function
    gets the block's output and the block's input; `output` for the whole of LN(ffn output + residual), where it gets
    the sum and the block's input; `embeddings` for the word embeddings (layer −1). Positions and keys that a change
    puts in front are not masked.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def at(place: str, layer: int, value: Tensor, read: Tensor) -> Tensor:
        return changes[place](layer, value, read) if place in changes else value

    ids, mask = batch["input_ids"], batch["attention_mask"]
    tables = "bert.embeddings."
    words = weights[f"{tables}word_embeddings.weight"][ids]
    x = at("embeddings", -1, words, words) + weights[f"{tables}token_type_embeddings.weight"][0]
    x = norm(f"{tables}LayerNorm", x + weights[f"{tables}position_embeddings.weight"][: x.shape[1]])
    layer = 0
    while (name := f"bert.encoder.layer.{layer}") + ".output.dense.weight" in weights:
        q, k, v = (
            at(part, layer, linear(f"{name}.attention.self.{part}", x), x)
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        visible = F.pad(mask, (k.shape[2] - mask.shape[1], 0), value=1)[:, None, None, :]
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(visible == 0, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        attended = at("attention_output", layer, linear(f"{name}.attention.output.dense", mixed), mixed)
        read = norm(f"{name}.attention.output.LayerNorm", attended + x)
        inner = at("ffn_inner", layer, linear(f"{name}.intermediate.dense", read), read)
        hidden = at("ffn_hidden", layer, F.gelu(inner), inner)
        second = at("ffn_output", layer, linear(f"{name}.output.dense", hidden), hidden)
        total = at("beside_ffn", layer, second, read) + read
        x = (
            at("output", layer, total, read)
            if "output" in changes
            else norm(f"{name}.output.LayerNorm", total)
        )
        layer += 1
    return linear("classifier", torch.tanh(linear("bert.pooler.dense", x[:, 0])))


def check_against(
    adapter: Adapter, changes: Callable[[dict[str, Tensor], dict[str, Tensor]], Changes]
) -> None:
    """Compare logits of `adapter` on a float64 BERT with those of `changes(own parameters, backbone weights)`."""
    model = tiny_model("bert").double()
    attachment = ht.attach(model, adapter)
    shake(attachment)
    weights = {name: value for name, value in model.state_dict().items() if "hadamard_attachment" not in name}
    with torch.no_grad():
        ours = model(**tiny_batch()).logits
        theirs = bert_by_formula(weights, 2, tiny_batch(), changes(attachment.state_dict(), weights))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
