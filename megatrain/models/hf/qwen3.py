"""Qwen 3 (dense): Llama with a norm on each head's query and key, and sliding windows in some
layers."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig
from megatrain.models.hf.llama import llama_like
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: HFConfigReader) -> TransformerConfig:
    # transformers derives layer_types from these.
    fields.without_effect("use_sliding_window", "max_window_layers")
    bias = bool(fields.attention_bias)
    return llama_like(
        fields, qkv_bias=bias, out_bias=bias, qk_norm="head", windows=fields.layer_windows()
    )
