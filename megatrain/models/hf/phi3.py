"""Phi-3 and 3.5: Llama with fused query, key and value, and fused gate and up."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf import llama
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS | {"partial_rotary_factor"}
_QKV, _GATE_UP = ("query", "key", "value"), ("gate", "up")
NAMES = llama.NAMES | {
    **{role: WeightName("model.layers.{}.self_attn.qkv_proj", _QKV) for role in _QKV},
    **{role: WeightName("model.layers.{}.mlp.gate_up_proj", _GATE_UP) for role in _GATE_UP},
}


def read(fields: HFConfigReader) -> TransformerConfig:
    fields.only("embd_pdrop", 0.0)  # ignored by transformers' model
    fields.without_effect("original_max_position_embeddings")  # copied into rope_parameters
    head_dim = fields.hidden_size // fields.num_attention_heads
    return llama.llama_like(
        fields,
        names=NAMES,
        rotary_dim=int(head_dim * fields.check_rope(partial=True)),
        windows=(fields.sliding_window,) * fields.num_hidden_layers,
        residual_dropout=fields.resid_pdrop,
    )
