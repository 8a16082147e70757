"""OLMo 2: norms after each branch and none before, and norms over all heads of queries and of keys."""

from __future__ import annotations

from megatrain.models.architecture import Architecture, Source
from megatrain.models.families import llama
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "attention_norm_after": Source("model.layers.{}.post_attention_layernorm"),
    "feedforward_norm_after": Source("model.layers.{}.post_feedforward_layernorm"),
}


def read(fields: Fields) -> Architecture:
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
