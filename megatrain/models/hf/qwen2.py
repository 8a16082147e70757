"""Qwen 2 and 2.5: Llama with biases on query, key and value, and sliding windows in some layers."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig
from megatrain.models.hf.llama import llama_like
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: HFConfigReader) -> TransformerConfig:
    # transformers derives layer_types from these.
    fields.without_effect("use_sliding_window", "max_window_layers")
    return llama_like(fields, qkv_bias=True, windows=fields.layer_windows())
