"""Gemma 2: pre- and post-norms that multiply by 1 + weight, scaled embeddings, soft caps."""

from __future__ import annotations

from typing import Any

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf import llama
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = llama.NAMES | {
    "attention_post_norm": WeightName("model.layers.{}.post_attention_layernorm"),
    "mlp_norm": WeightName("model.layers.{}.pre_feedforward_layernorm"),
    "mlp_post_norm": WeightName("model.layers.{}.post_feedforward_layernorm"),
}


def gemma_like(fields: HFConfigReader, **switches: Any) -> TransformerConfig:
    """Returns the config that Gemma 2 and 3 share."""
    fields.only("use_bidirectional_attention", None, False)
    bias = bool(fields.attention_bias)
    shared: dict[str, Any] = {
        "names": NAMES,
        "norm_plus_one": True,
        "post_norm": True,
        "embedding_scale": fields.hidden_size**0.5,
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_scale": fields.query_pre_attn_scalar**-0.5,
        "logit_softcap": fields.final_logit_softcapping,
        "windows": fields.layer_windows(),
    }
    return llama.llama_like(fields, activation="hidden_activation", **(shared | switches))


def read(fields: HFConfigReader) -> TransformerConfig:
    return gemma_like(fields, attention_softcap=fields.attn_logit_softcapping)
