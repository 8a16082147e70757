"""Gemma 3, text model: Gemma 2 with query and key norms instead of capped scores, RoPE by layer
type."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig
from megatrain.models.hf.gemma2 import gemma_like
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS | {"rope_local_base_freq", "sliding_window_pattern"}


def read(fields: HFConfigReader) -> TransformerConfig:
    fields.only("attn_logit_softcapping", None)  # ignored by transformers' model
    kinds = tuple(fields.layer_types)
    for kind in dict.fromkeys(kinds):
        fields.check_rope(kind)
    return gemma_like(fields, qk_norm="head", rope_kinds=kinds)
