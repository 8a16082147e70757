"""Qwen 3 (dense): Llama with a norm on each head's query and key, and sliding windows in some layers."""

from __future__ import annotations

from megatrain.models.architecture import Architecture
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields
from megatrain.models.families.llama import llama_like

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: Fields) -> Architecture:
    fields.without_effect(
        "use_sliding_window", "max_window_layers"
    )  # transformers has made layer_types of them
    bias = bool(fields.attention_bias)
    return llama_like(
        fields, qkv_bias=bias, out_bias=bias, qk_norm="head", windows=fields.layer_windows()
    )
