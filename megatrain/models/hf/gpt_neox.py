"""GPT-NeoX and Pythia: parallel attention and MLP, partial rotations, query, key, value fused by
head."""

from __future__ import annotations

from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf_reader import HFConfigReader

OLD_FIELDS = frozenset({"rotary_emb_base", "rotary_pct", "rope_scaling"})
_QKV = ("query", "key", "value")
NAMES = {
    "embedding": WeightName("gpt_neox.embed_in"),
    "attention_norm": WeightName("gpt_neox.layers.{}.input_layernorm"),
    **{
        role: WeightName("gpt_neox.layers.{}.attention.query_key_value", _QKV, by_head=True)
        for role in _QKV
    },
    "out": WeightName("gpt_neox.layers.{}.attention.dense"),
    "mlp_norm": WeightName("gpt_neox.layers.{}.post_attention_layernorm"),
    "up": WeightName("gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "down": WeightName("gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "final_norm": WeightName("gpt_neox.final_layer_norm"),
    "head": WeightName("lm_head"),
}


def read(fields: HFConfigReader) -> TransformerConfig:
    fields.without_effect("classifier_dropout", "is_decoder")
    heads, bias = fields.num_attention_heads, bool(fields.attention_bias)
    head_dim = fields.hidden_size // heads
    return TransformerConfig(
        model_type="gpt_neox",
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        num_layers=fields.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.intermediate_size,
        max_positions=fields.max_position_embeddings,
        names=NAMES,
        norm="layer",
        norm_eps=fields.layer_norm_eps,
        activation=fields.activation("hidden_act"),
        gated=False,
        parallel_residual=bool(fields.use_parallel_residual),
        rotary_dim=int(head_dim * fields.check_rope(partial=True)),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=bool(fields.tie_word_embeddings),
        init_std=fields.initializer_range,
        embedding_dropout=fields.hidden_dropout,
        residual_dropout=fields.hidden_dropout,
        attention_dropout=fields.attention_dropout,
        renamed_weights={"embed_out.weight": "lm_head.weight"},
        config=fields.config,
    )
