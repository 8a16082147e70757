"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig
from megatrain.models.hf.llama import llama_like
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: HFConfigReader) -> TransformerConfig:
    return llama_like(fields, windows=(fields.sliding_window,) * fields.num_hidden_layers)
