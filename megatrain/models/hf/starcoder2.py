"""StarCoder 2: Llama's attention with layer norms, biases, and a plain MLP."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf import llama
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "up": WeightName("model.layers.{}.mlp.c_fc"),
    "down": WeightName("model.layers.{}.mlp.c_proj"),
}


def read(fields: HFConfigReader) -> TransformerConfig:
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
