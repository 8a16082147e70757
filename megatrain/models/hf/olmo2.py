"""OLMo 2: post-norms without pre-norms, and norms over all heads of queries and of keys."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf import llama
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "attention_post_norm": WeightName("model.layers.{}.post_attention_layernorm"),
    "mlp_post_norm": WeightName("model.layers.{}.post_feedforward_layernorm"),
}


def read(fields: HFConfigReader) -> TransformerConfig:
    bias = bool(fields.attention_bias)
    return llama.llama_like(
        fields,
        names=NAMES,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="all",
        pre_norm=False,
        post_norm=True,
    )
