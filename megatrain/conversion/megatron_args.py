"""The `args` of a Megatron-LM checkpoint, and the transformers config of the same model.

The args are those of the training command. One that changes the computation is either supported or
rejected by name.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.errors import CheckpointError


@dataclass(frozen=True)
class MegatronArgs:
    """A decoder as Megatron-LM computes it; sizes are those of the whole model."""

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
    mlp_bias: bool
    qkv_bias: bool
    tied: bool
    qk_norm: bool = False
    rotary: bool = False
    rope_base: float = 0.0
    rope_factor: float | None = None
    rope_llama3: bool = False


_SUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Arguments that change the computation, with their supported values, the default first."""


def read_args(args: Namespace, folder: Path) -> MegatronArgs:
    """Returns the model that the args describe; raises CheckpointError if it is not supported."""
    values = vars(args)
    _check_supported(values, folder)
    hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
    gated, bias = bool(values.get("swiglu", False)), bool(values.get("add_bias_linear", True))
    llama3 = bool(values.get("use_rope_scaling", False))
    if llama3:
        factor = values.get("rope_scaling_factor", 8.0)
    else:
        factor = values.get("rotary_seq_len_interpolation_factor")
    tanh = values.get("openai_gelu", False) or values.get("bias_gelu_fusion", True)
    grouped = values.get("group_query_attention", False)
    return MegatronArgs(
        num_layers=values["num_layers"],
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_groups=(values.get("num_query_groups") or num_heads) if grouped else num_heads,
        head_dim=values.get("kv_channels") or hidden_size // num_heads,
        ffn_size=values.get("ffn_hidden_size") or 4 * hidden_size,
        max_positions=values["max_position_embeddings"],
        norm=values.get("normalization", "LayerNorm"),
        norm_eps=values.get("norm_epsilon", values.get("layernorm_epsilon", 1e-5)),
        gated=gated,
        activation="silu" if gated else "gelu_tanh" if tanh else "gelu",
        rotary=_position_embedding(values) == "rope",
        rope_base=float(values.get("rotary_base", 10000)),
        rope_factor=None if factor in (None, 1, 1.0) else float(factor),
        rope_llama3=llama3,
        mlp_bias=bias,
        qkv_bias=bias or bool(values.get("add_qkv_bias", False)),
        qk_norm=bool(values.get("qk_layernorm", False)),
        tied=not values.get("untie_embeddings_and_output_weights", False),
    )


def _check_supported(values: dict[str, Any], folder: Path) -> None:
    def error(name: str, requirement: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {name}={values.get(name)} in its args {requirement}")

    for name, allowed in _SUPPORTED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise error(name, "is not supported; convert it with Megatron-LM's own tools")
    if _position_embedding(values) not in ("rope", "learned_absolute"):
        raise error(
            "position_embedding_type", "is not supported (supported: rope, learned_absolute)"
        )
    if values.get("normalization", "LayerNorm") not in ("LayerNorm", "RMSNorm"):
        raise error("normalization", "is not supported (supported: LayerNorm, RMSNorm)")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if not _is_count(values.get(name)):
            raise error(name, "must be at least 1; name the model's config with --config")


def _position_embedding(values: dict[str, Any]) -> Any:
    if values.get("use_rotary_position_embeddings"):
        return "rope"
    return values.get("position_embedding_type", "learned_absolute")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def args_of_config(config: Any) -> MegatronArgs:
    """Returns the model of a transformers config, for a checkpoint without args."""
    if config.model_type == "gpt2":
        return MegatronArgs(
            num_layers=config.n_layer,
            hidden_size=config.n_embd,
            num_heads=config.n_head,
            num_groups=config.n_head,
            head_dim=config.n_embd // config.n_head,
            ffn_size=config.n_inner or 4 * config.n_embd,
            max_positions=config.n_positions,
            norm="LayerNorm",
            norm_eps=config.layer_norm_epsilon,
            gated=False,
            activation="gelu" if config.activation_function == "gelu" else "gelu_tanh",
            mlp_bias=True,
            qkv_bias=True,
            tied=bool(config.tie_word_embeddings),
        )
    num_heads, rope = config.num_attention_heads, config.rope_parameters
    scaled = rope.get("rope_type", "default") != "default"
    return MegatronArgs(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=num_heads,
        num_groups=config.num_key_value_heads or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        ffn_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm="RMSNorm",
        norm_eps=config.rms_norm_eps,
        gated=True,
        activation="silu",
        rotary=True,
        rope_base=float(rope["rope_theta"]),
        rope_factor=float(rope["factor"]) if scaled else None,
        rope_llama3=rope.get("rope_type") == "llama3",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qkv_bias=bool(getattr(config, "attention_bias", False)) or config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        tied=bool(config.tie_word_embeddings),
    )


def config_fields(args: MegatronArgs, vocab_size: int, folder: Path) -> dict[str, Any]:
    """Returns the fields of a transformers config of the model.

    Raises:
        CheckpointError: transformers has no such model.
    """
    if args.rotary and args.gated and args.norm == "RMSNorm":
        return _llama_fields(args, vocab_size, folder)
    if not args.rotary and not args.gated and args.norm == "LayerNorm":
        return _gpt2_fields(args, vocab_size, folder)
    raise CheckpointError(
        f"{folder}: transformers has no model with {'rope' if args.rotary else 'learned positions'}"
        f", {args.norm} and {'swiglu' if args.gated else 'a plain MLP'} (supported: rope, RMSNorm "
        "and swiglu as in Llama; learned positions, LayerNorm and a plain MLP as in GPT-2)"
    )


def _llama_fields(args: MegatronArgs, vocab_size: int, folder: Path) -> dict[str, Any]:
    kinds = {
        (False, False, False): "llama",
        (True, True, False): "llama",
        (False, True, False): "qwen2",
        (False, False, True): "qwen3",
    }
    kind = kinds.get((args.mlp_bias, args.qkv_bias, args.qk_norm))
    if kind is None:
        raise CheckpointError(
            f"{folder}: transformers has no model with add_bias_linear={args.mlp_bias}, "
            f"add_qkv_bias={args.qkv_bias} and qk_layernorm={args.qk_norm}"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_base}
    if args.rope_factor is not None:
        rope |= {
            "rope_type": "llama3" if args.rope_llama3 else "linear",
            "factor": args.rope_factor,
        }
    if args.rope_llama3 and args.rope_factor is not None:
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    fields = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_groups,
        "max_position_embeddings": args.max_positions,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
    }
    if kind == "qwen2" and args.head_dim * args.num_heads != args.hidden_size:
        raise CheckpointError(
            f"{folder}: kv_channels={args.head_dim} in its args: Qwen2 requires hidden_size / heads"
        )
    if kind != "qwen2":
        fields |= {"head_dim": args.head_dim, "attention_bias": args.qkv_bias}
    if kind == "llama":
        fields["mlp_bias"] = args.mlp_bias
    return fields | {"bos_token_id": None, "eos_token_id": None}


def _gpt2_fields(args: MegatronArgs, vocab_size: int, folder: Path) -> dict[str, Any]:
    required = {
        "add_bias_linear": args.mlp_bias,
        "biases of query, key and value": args.qkv_bias,
        "no qk_layernorm": not args.qk_norm,
        "as many query groups as heads": args.num_groups == args.num_heads,
        "kv_channels of hidden_size / heads": args.head_dim * args.num_heads == args.hidden_size,
    }
    for name, holds in required.items():
        if not holds:
            raise CheckpointError(f"{folder}: GPT-2 in transformers requires {name}")
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": args.hidden_size,
        "n_inner": args.ffn_size,
        "n_layer": args.num_layers,
        "n_head": args.num_heads,
        "n_positions": args.max_positions,
        "layer_norm_epsilon": args.norm_eps,
        "activation_function": "gelu" if args.activation == "gelu" else "gelu_new",
        "tie_word_embeddings": args.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
