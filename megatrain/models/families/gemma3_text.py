"""Gemma 3, its text model: Gemma 2 with norms on queries and keys instead of the scores' cap, and rotations by layer type."""

from __future__ import annotations

from megatrain.models.architecture import Architecture
from megatrain.models.families.fields import OLD_ROPE_FIELDS, Fields
from megatrain.models.families.gemma2 import gemma_like

OLD_FIELDS = OLD_ROPE_FIELDS | {"rope_local_base_freq", "sliding_window_pattern"}


def read(fields: Fields) -> Architecture:
    fields.only("attn_logit_softcapping", None)  # transformers' own model does not read it either
    kinds = tuple(fields.layer_types)
    for kind in dict.fromkeys(kinds):
        fields.check_rope(kind)
    return gemma_like(fields, qk_norm="head", rope_kinds=kinds)
