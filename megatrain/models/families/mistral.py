"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from megatrain.models.architecture import Architecture
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields
from megatrain.models.families.llama import llama_like

OLD_FIELDS = OLD_ROPE_FIELDS


def read(fields: Fields) -> Architecture:
    return llama_like(fields, windows=(fields.sliding_window,) * fields.num_hidden_layers)
