"""Tiny models of each family, and variants with other options, as fields of a run's `model:`."""

from __future__ import annotations

from typing import Any

VOCABULARY = 67
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
_GEMMA = {
    **_GROUPED,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "pad_token_id": 0,
}

BASES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_SIZES, "rotary_pct": 0.5},
    "llama": {"model_type": "llama", **_GROUPED},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **_GROUPED},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {"model_type": "gemma3_text", **_GEMMA, "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3", **_GROUPED, "pad_token_id": None},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "starcoder2": {"model_type": "starcoder2", **_GROUPED},
}

_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "untied": {"tie_word_embeddings": False},
        "wide relu": {"n_inner": 40, "activation_function": "relu"},
    },
    "gpt_neox": {
        "tied sequential": {"tie_word_embeddings": True, "use_parallel_residual": False},
        "no bias, all dims turn": {
            "attention_bias": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": 100.0,
        },
        "linear": {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            }
        },
    },
    "llama": {
        "tied, llama3 rope": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        "biases, head_dim": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
        "one key-value head, yarn": {"num_key_value_heads": 1, "rope_parameters": YARN_ROPE},
    },
    "mistral": {"no window": {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 16}},
    "qwen2": {
        "tied, windows": {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        }
    },
    "qwen3": {"tied, biases": {"tie_word_embeddings": True, "attention_bias": True}},
    "gemma2": {
        "untied, biases, no caps": {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        "one key-value head": {
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
    "gemma3_text": {
        "untied, capped, scaled": {
            "tie_word_embeddings": False,
            "final_logit_softcapping": 2.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        "all full": {"layer_types": ["full_attention"] * 3},
    },
    "phi3": {
        "tied, window": {
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "num_key_value_heads": 1,
        },
        "longrope": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8},
        "longrope, short": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32},
        "partial": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            }
        },
    },
    "olmo2": {
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
        "all heads alike": {"num_key_value_heads": None},
    },
    "starcoder2": {
        "untied, no bias, window": {
            "tie_word_embeddings": False,
            "use_bias": False,
            "sliding_window": 5,
        }
    },
}

VARIANTS: dict[str, dict[str, Any]] = BASES | {
    f"{family}: {name}": BASES[family] | change
    for family, changes in _CHANGES.items()
    for name, change in changes.items()
}
