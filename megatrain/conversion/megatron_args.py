"""What a Megatron-LM checkpoint says of its model, and the transformers config of the same model.

Its `args` are those of the training command. One that changes the maths is honoured or refused by name.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.errors import CheckpointError


@dataclass(frozen=True)
class MegatronArgs:
    """A decoder as Megatron-LM computes it. Sizes are of the whole model; `rope` names how frequencies are scaled."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm: Literal["LayerNorm", "RMSNorm"]
    norm_eps: float
    gated: bool
    activation: Literal["silu", "gelu", "gelu_tanh"]
    rotary: bool
    rope_base: float
    rope_factor: float | None
    rope_llama3: bool
    mlp_bias: bool
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    padded_vocab_size: int | None


_PLAIN: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "num_experts": (None, 0),
    "apply_layernorm_1p": (False,),
    "squared_relu": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "window_size": (None,),
    "qk_l2_norm": (False,),
    "no_rope_freq": (None,),
    "mtp_num_layers": (None, 0),
    "glu_activation": (None,),
    "hybrid_attention_ratio": (0.0, None),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "attention_output_gate": (False,),
    "encoder_num_layers_override": (None,),
    "softmax_type": ("vanilla",),
    "parallel_attn": (False,),
    "use_post_ln": (False,),
    "multi_query_attention": (False,),
    "moe_grouped_gemm": (False, None),
    "experimental_attention_variant": (None,),
}
"""Arguments that change the maths, with the values that mean the decoder which is read here."""


def read_args(args: Namespace, path: Path) -> MegatronArgs:
    """The settings; refuses a model that is not read."""
    given = vars(args)

    def refuse(name: str, words: str) -> CheckpointError:
        return CheckpointError(f"{path} was trained with {name}={given.get(name)}, {words}")

    for name, allowed in _PLAIN.items():
        if given.get(name, allowed[0]) not in allowed:
            raise refuse(name, "which is not read; convert it with Megatron-LM's own tools")
    positions = (
        "rope"
        if given.get("use_rotary_position_embeddings")
        else given.get("position_embedding_type", "learned_absolute")
    )
    if positions not in ("rope", "learned_absolute"):
        raise refuse("position_embedding_type", "and rope and learned_absolute are read")
    norm = given.get("normalization", "LayerNorm")
    if norm not in ("LayerNorm", "RMSNorm"):
        raise refuse("normalization", "and LayerNorm and RMSNorm are read")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if not _is_count(given.get(name)):
            raise refuse(name, "which should be a number from 1; name the model with --config")
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    gated, bias = bool(given.get("swiglu", False)), bool(given.get("add_bias_linear", True))
    llama3 = bool(given.get("use_rope_scaling", False))
    factor = (
        given.get("rope_scaling_factor", 8.0)
        if llama3
        else given.get("rotary_seq_len_interpolation_factor")
    )
    tanh = given.get("openai_gelu", False) or given.get("bias_gelu_fusion", True)
    return MegatronArgs(
        num_layers=given["num_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_groups=(given.get("num_query_groups") or heads)
        if given.get("group_query_attention", False)
        else heads,
        head_dim=given.get("kv_channels") or hidden // heads,
        ffn_size=given.get("ffn_hidden_size") or 4 * hidden,
        max_positions=given["max_position_embeddings"],
        norm=norm,
        norm_eps=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        gated=gated,
        activation="silu" if gated else "gelu_tanh" if tanh else "gelu",
        rotary=positions == "rope",
        rope_base=float(given.get("rotary_base", 10000)),
        rope_factor=None if factor in (None, 1, 1.0) else float(factor),
        rope_llama3=llama3,
        mlp_bias=bias,
        qkv_bias=bias or bool(given.get("add_qkv_bias", False)),
        qk_norm=bool(given.get("qk_layernorm", False)),
        tied=not given.get("untie_embeddings_and_output_weights", False),
        padded_vocab_size=given.get("padded_vocab_size"),
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def args_of_config(config: Any) -> MegatronArgs:
    """The same, of a checkpoint without args, from the config that the user names."""
    if config.model_type == "gpt2":
        return MegatronArgs(
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.n_head,
            config.n_embd // config.n_head,
            config.n_inner or 4 * config.n_embd,
            config.n_positions,
            "LayerNorm",
            config.layer_norm_epsilon,
            False,
            "gelu" if config.activation_function == "gelu" else "gelu_tanh",
            False,
            0.0,
            None,
            False,
            True,
            True,
            False,
            bool(config.tie_word_embeddings),
            None,
        )
    heads, rope = config.num_attention_heads, config.rope_parameters
    bias = bool(getattr(config, "attention_bias", False))
    return MegatronArgs(
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        config.num_key_value_heads or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.intermediate_size,
        config.max_position_embeddings,
        "RMSNorm",
        config.rms_norm_eps,
        True,
        "silu",
        True,
        float(rope["rope_theta"]),
        float(rope["factor"]) if rope.get("rope_type", "default") != "default" else None,
        rope.get("rope_type") == "llama3",
        bool(getattr(config, "mlp_bias", False)),
        bias or config.model_type == "qwen2",
        config.model_type == "qwen3",
        bool(config.tie_word_embeddings),
        None,
    )


def config_fields(s: MegatronArgs, vocab_size: int, path: Path) -> dict[str, Any]:
    """A transformers config of the model that the settings describe."""
    if s.rotary and s.gated and s.norm == "RMSNorm":
        return _llama_fields(s, vocab_size, path)
    if not s.rotary and not s.gated and s.norm == "LayerNorm":
        return _gpt2_fields(s, vocab_size, path)
    raise CheckpointError(
        f"{path} is of no model that transformers has: {'rope' if s.rotary else 'learned positions'}, {s.norm} and "
        f"{'swiglu' if s.gated else 'a plain MLP'}; Llama has rope, RMSNorm and swiglu, GPT-2 learned positions, LayerNorm and a plain MLP"
    )


def _llama_fields(s: MegatronArgs, vocab_size: int, path: Path) -> dict[str, Any]:
    kinds = {
        (False, False, False): "llama",
        (True, True, False): "llama",
        (False, True, False): "qwen2",
        (False, False, True): "qwen3",
    }
    kind = kinds.get((s.mlp_bias, s.qkv_bias, s.qk_norm))
    if kind is None:
        raise CheckpointError(
            f"{path} is of no model that transformers has: add_bias_linear={s.mlp_bias}, biases of query, key and value={s.qkv_bias}, "
            f"qk_layernorm={s.qk_norm}"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": s.rope_base}
    if s.rope_factor is not None:
        rope |= {"rope_type": "llama3" if s.rope_llama3 else "linear", "factor": s.rope_factor}
    if s.rope_llama3 and s.rope_factor is not None:
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    fields = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": s.hidden_size,
        "intermediate_size": s.ffn_size,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_groups,
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": s.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": s.tied,
        "hidden_act": "silu",
    }
    if kind == "qwen2" and s.head_dim * s.num_heads != s.hidden_size:
        raise CheckpointError(
            f"{path} has kv_channels={s.head_dim}, and Qwen2 has hidden_size / heads"
        )
    if kind != "qwen2":
        fields |= {"head_dim": s.head_dim, "attention_bias": s.qkv_bias}
    if kind == "llama":
        fields["mlp_bias"] = s.mlp_bias
    return fields | {"bos_token_id": None, "eos_token_id": None}


def _gpt2_fields(s: MegatronArgs, vocab_size: int, path: Path) -> dict[str, Any]:
    wanted = {
        "add_bias_linear": s.mlp_bias,
        "biases of query, key and value": s.qkv_bias,
        "no qk_layernorm": not s.qk_norm,
        "as many query groups as heads": s.num_groups == s.num_heads,
        "kv_channels of hidden_size / heads": s.head_dim * s.num_heads == s.hidden_size,
    }
    for name, there in wanted.items():
        if not there:
            raise CheckpointError(f"{path} is of no model that transformers has: GPT-2 has {name}")
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": s.hidden_size,
        "n_inner": s.ffn_size,
        "n_layer": s.num_layers,
        "n_head": s.num_heads,
        "n_positions": s.max_positions,
        "layer_norm_epsilon": s.norm_eps,
        "activation_function": "gelu" if s.activation == "gelu" else "gelu_new",
        "tie_word_embeddings": s.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
