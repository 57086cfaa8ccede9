"""The module paths of each architecture: one short table each. `sites` reads them; no method does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTable:
    """The module paths of one stack of layers, relative to a layer.

    `a|b` takes the first path that exists; `path[i/n]` is the i-th of n equal slices of a fused projection
    (`path[i/n*]`: the slices are interleaved head by head). In pre-norm models the norm that follows the feed-forward
    block is the first norm of the next layer: `next:path`, and `last_norm` for the last layer.
    """

    layers: str  # the list of layers, relative to the base model
    output_projection: str
    query: str
    key: str
    value: str
    ffn_first: str
    ffn_second: str
    attention_norm: str
    ffn_norm: str
    last_norm: str = ""  # relative to the base model
    # The entry of the config that decides whether the four projections of the attention have biases.
    bias_switch: str = ""


_BERT = LayerTable(
    layers="encoder.layer",
    output_projection="attention.output.dense",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    ffn_first="intermediate.dense",
    ffn_second="output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn_norm="output.LayerNorm",
)
_FUSED_DEBERTA = "attention.self.in_proj[{}/3*]"


def _derived(table: LayerTable, **changes: str) -> LayerTable:
    return LayerTable(**{**table.__dict__, **changes})


def _bart(stack: str) -> LayerTable:
    return LayerTable(
        layers=f"{stack}.layers",
        output_projection="self_attn.out_proj",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        ffn_first="fc1",
        ffn_second="fc2",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
    )


def _t5(stack: str, ffn: int) -> LayerTable:
    dense = f"layer.{ffn}.DenseReluDense"
    return LayerTable(
        layers=f"{stack}.block",
        output_projection="layer.0.SelfAttention.o",
        query="layer.0.SelfAttention.q",
        key="layer.0.SelfAttention.k",
        value="layer.0.SelfAttention.v",
        ffn_first=f"{dense}.wi|{dense}.wi_0",
        ffn_second=f"{dense}.wo",
        attention_norm="layer.1.layer_norm",
        ffn_norm="next:layer.0.layer_norm",
        last_norm=f"{stack}.final_layer_norm",
    )


ARCHITECTURES: dict[str, tuple[LayerTable, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "electra": (_BERT,),
    "deberta": (
        _derived(
            _BERT,
            query=_FUSED_DEBERTA.format(0),
            key=_FUSED_DEBERTA.format(1),
            value=_FUSED_DEBERTA.format(2),
        ),
    ),
    "deberta-v2": (
        _derived(
            _BERT,
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
        ),
    ),
    "mpnet": (
        _derived(
            _BERT,
            output_projection="attention.attn.o",
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_norm="attention.LayerNorm",
        ),
    ),
    "distilbert": (
        LayerTable(
            layers="transformer.layer",
            output_projection="attention.out_lin",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            ffn_first="ffn.lin1",
            ffn_second="ffn.lin2",
            attention_norm="sa_layer_norm",
            ffn_norm="output_layer_norm",
        ),
    ),
    # One entry per depth step: `unshare` gives each step its own place to attach to.
    "albert": (
        LayerTable(
            layers="encoder.albert_layer_groups",
            output_projection="albert_layers.0.attention.dense",
            query="albert_layers.0.attention.query",
            key="albert_layers.0.attention.key",
            value="albert_layers.0.attention.value",
            ffn_first="albert_layers.0.ffn",
            ffn_second="albert_layers.0.ffn_output",
            attention_norm="albert_layers.0.attention.LayerNorm",
            ffn_norm="albert_layers.0.full_layer_layer_norm",
        ),
    ),
    "modernbert": (
        LayerTable(
            layers="layers",
            output_projection="attn.Wo",
            query="attn.Wqkv[0/3]",
            key="attn.Wqkv[1/3]",
            value="attn.Wqkv[2/3]",
            ffn_first="mlp.Wi",
            ffn_second="mlp.Wo",
            attention_norm="mlp_norm",
            ffn_norm="next:attn_norm",
            last_norm="final_norm",
            bias_switch="attention_bias",
        ),
    ),
    "bart": (_bart("encoder"), _bart("decoder")),
    "t5": (_t5("encoder", 1), _t5("decoder", 2)),
    "gpt2": (
        LayerTable(
            layers="h",
            output_projection="attn.c_proj",
            query="attn.c_attn[0/3]",
            key="attn.c_attn[1/3]",
            value="attn.c_attn[2/3]",
            ffn_first="mlp.c_fc",
            ffn_second="mlp.c_proj",
            attention_norm="ln_2",
            ffn_norm="next:ln_1",
            last_norm="ln_f",
        ),
    ),
    "llama": (
        LayerTable(
            layers="layers",
            output_projection="self_attn.o_proj",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            ffn_first="mlp.up_proj",
            ffn_second="mlp.down_proj",
            attention_norm="post_attention_layernorm",
            ffn_norm="next:input_layernorm",
            last_norm="norm",
            bias_switch="attention_bias",
        ),
    ),
}

# Architectures whose query and key projections also project a table of relative positions if this entry is set.
POSITIONS_PROJECTED = {"deberta-v2": "share_att_key"}

# Architectures with learned positions, and how many rows of that table are unused ("padding": up to that of padding).
POSITIONS_UNUSED: dict[str, int | str] = {
    "bert": 0,
    "electra": 0,
    "distilbert": 0,
    "albert": 0,
    "bart": 0,
    "gpt2": 0,
    "roberta": "padding",
    "xlm-roberta": "padding",
    "mpnet": 2,
}
# Architectures that have learned positions too if their config sets `position_biased_input`.
RELATIVE = ("deberta", "deberta-v2")
