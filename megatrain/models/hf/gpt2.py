"""GPT-2: learned positions, layer norms, biases, fused query, key and value, matrices [in, out]."""

from __future__ import annotations

from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig, WeightName
from megatrain.models.hf_reader import HFConfigReader

OLD_FIELDS = frozenset[str]()
_QKV = ("query", "key", "value")
NAMES = {
    "embedding": WeightName("transformer.wte"),
    "positions": WeightName("transformer.wpe"),
    "attention_norm": WeightName("transformer.h.{}.ln_1"),
    **{role: WeightName("transformer.h.{}.attn.c_attn", _QKV) for role in _QKV},
    "out": WeightName("transformer.h.{}.attn.c_proj"),
    "mlp_norm": WeightName("transformer.h.{}.ln_2"),
    "up": WeightName("transformer.h.{}.mlp.c_fc"),
    "down": WeightName("transformer.h.{}.mlp.c_proj"),
    "final_norm": WeightName("transformer.ln_f"),
    "head": WeightName("lm_head"),
}


def read(fields: HFConfigReader) -> TransformerConfig:
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    # Fields of other heads, and the order of a half-precision scaling that ours does in fp32.
    fields.without_effect(
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "reorder_and_upcast_attn",
    )
    if fields.n_embd % fields.n_head:
        divisors = (n for n in range(fields.n_head, 0, -1) if fields.n_embd % n == 0)
        raise ConfigError(
            "model.n_head",
            fields.n_head,
            f"must divide n_embd={fields.n_embd}",
            fix={"model.n_head": next(divisors)},
        )
    return TransformerConfig(
        model_type="gpt2",
        vocab_size=fields.vocab_size,
        hidden_size=fields.n_embd,
        num_layers=fields.n_layer,
        num_heads=fields.n_head,
        num_kv_heads=fields.n_head,
        head_dim=fields.n_embd // fields.n_head,
        intermediate_size=fields.n_inner or 4 * fields.n_embd,
        max_positions=fields.n_positions,
        names=NAMES,
        norm="layer",
        norm_eps=fields.layer_norm_epsilon,
        activation=fields.activation("activation_function"),
        gated=False,
        rotary=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(fields.tie_word_embeddings),
        transposed=True,
        init_std=fields.initializer_range,
        residual_init_std=fields.initializer_range / (2 * fields.n_layer) ** 0.5,
        embedding_dropout=fields.embd_pdrop,
        residual_dropout=fields.resid_pdrop,
        attention_dropout=fields.attn_pdrop,
        config=fields.config,
    )
