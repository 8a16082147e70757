"""StarCoder 2: Llama's attention with layer norms, biases everywhere, and a feed-forward without a gate."""

from __future__ import annotations

from megatrain.models.architecture import Architecture, Source
from megatrain.models.families import llama
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "up": Source("model.layers.{}.mlp.c_fc"),
    "down": Source("model.layers.{}.mlp.c_proj"),
}


def read(fields: Fields) -> Architecture:
    bias = bool(fields.use_bias)
    return llama.llama_like(
        fields,
        names=NAMES,
        norm="layer",
        norm_eps=fields.norm_epsilon,
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=(fields.sliding_window,) * fields.num_hidden_layers,
        embedding_dropout=fields.embedding_dropout,
        residual_dropout=fields.residual_dropout,
    )
