"""OLMo 2: norms after each branch and none before, and norms over all heads of queries and of keys."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf import llama
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "attention_norm_after": WeightName("model.layers.{}.post_attention_layernorm"),
    "feedforward_norm_after": WeightName("model.layers.{}.post_feedforward_layernorm"),
}


def read(fields: HFConfigReader) -> TransformerConfig:
    bias = bool(fields.attention_bias)
    return llama.llama_like(
        fields,
        names=NAMES,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="all",
        norm_before=False,
        norm_after=True,
    )
