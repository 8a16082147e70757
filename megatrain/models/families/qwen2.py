"""Qwen 2 and 2.5: Llama with biases on query, key and value, and sliding windows in some layers."""

from __future__ import annotations

from megatrain.models.architecture import Architecture
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields
from megatrain.models.families.llama import llama_like

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: Fields) -> Architecture:
    fields.without_effect(
        "use_sliding_window", "max_window_layers"
    )  # transformers has made layer_types of them
    return llama_like(fields, qkv_bias=True, windows=fields.layer_windows())
