"""Llama 1 to 3.x, and the config that many families share with it."""

from __future__ import annotations

from typing import Any

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf_reader import OLD_ROPE_FIELDS, HFConfigReader

OLD_FIELDS = OLD_ROPE_FIELDS
NAMES = {
    "embedding": WeightName("model.embed_tokens"),
    "attention_norm": WeightName("model.layers.{}.input_layernorm"),
    "query": WeightName("model.layers.{}.self_attn.q_proj"),
    "key": WeightName("model.layers.{}.self_attn.k_proj"),
    "value": WeightName("model.layers.{}.self_attn.v_proj"),
    "query_norm": WeightName("model.layers.{}.self_attn.q_norm"),
    "key_norm": WeightName("model.layers.{}.self_attn.k_norm"),
    "out": WeightName("model.layers.{}.self_attn.o_proj"),
    "mlp_norm": WeightName("model.layers.{}.post_attention_layernorm"),
    "gate": WeightName("model.layers.{}.mlp.gate_proj"),
    "up": WeightName("model.layers.{}.mlp.up_proj"),
    "down": WeightName("model.layers.{}.mlp.down_proj"),
    "final_norm": WeightName("model.norm"),
    "head": WeightName("lm_head"),
}


def llama_like(
    fields: HFConfigReader, *, activation: str = "hidden_act", **switches: Any
) -> TransformerConfig:
    """Returns the config of a family like Llama.

    Args:
        activation: the field that names the activation.
        switches: fields of the `TransformerConfig` in which the family differs.
    """
    if "rope_kinds" not in switches and "rotary_dim" not in switches:
        fields.check_rope()
    heads = fields.num_attention_heads
    values: dict[str, Any] = {
        "model_type": fields.model_type,
        "vocab_size": fields.vocab_size,
        "hidden_size": fields.hidden_size,
        "num_layers": fields.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": fields.num_key_value_heads or heads,
        "head_dim": fields.get("head_dim") or fields.hidden_size // heads,
        "intermediate_size": fields.intermediate_size,
        "max_positions": fields.max_position_embeddings,
        "names": NAMES,
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "activation": fields.activation(activation),
        "tied": bool(fields.tie_word_embeddings),
        "init_std": fields.initializer_range,
        "attention_dropout": fields.attention_dropout or 0.0,
        "padding_token": fields.padding_token(),
        "config": fields.config,
    }
    return TransformerConfig(**(values | switches))


def read(fields: HFConfigReader) -> TransformerConfig:
    fields.only("pretraining_tp", 1)
    bias = bool(fields.attention_bias)
    return llama_like(fields, qkv_bias=bias, out_bias=bias, mlp_bias=bool(fields.mlp_bias))
