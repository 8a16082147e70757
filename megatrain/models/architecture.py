"""What a Hugging Face config means for our layers: one dataclass of switches, read from the config by one function a family.

A field of the config that changes the maths is honoured or refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Source(NamedTuple):
    """Where a role's tensors are in a checkpoint.

    `name` has `{}` for the layer's index and no `.weight` or `.bias`. `fused` lists the roles that share the tensor, in their
    order along the output features.
    """

    name: str
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A decoder as a list of layers needs to know it. Sizes are those of the whole model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    names: dict[str, Source]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    rotary: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    padding_token: int | None = None
    """Its embedding starts at zero and gets no gradient from the input, as with torch's padding_idx."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens; None attends to all before."""
    transposed: bool = False
    """Matrices are stored as [in, out]."""
    init_std: float = 0.02
    residual_init_std: float | None = None
    """Standard deviation of the projections that end a residual branch, where it differs."""
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    config: Any = field(default=None, repr=False, compare=False)
    """The transformers config itself."""

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


# ---------------------------------------------------------------------------------------------------------------------
# from what the user wrote to a transformers config


def load_config(model: str | dict[str, Any]) -> PreTrainedConfig:
    """The transformers config that a run's `model:` names: a folder, a config.json, or inline fields."""
    from transformers import AutoConfig

    if isinstance(model, dict):
        return _inline_config(model)
    if not model:
        raise ConfigError("model", "(nothing)", "is missing", "give a folder, a config.json, or fields with model_type")
    path = Path(model)
    if not path.exists():
        raise ConfigError("model", model, "does not exist", "give a folder, a config.json, or fields with model_type")
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ConfigError("model", model, f"is not a readable Hugging Face config: {_one_line(error)}") from error


def _inline_config(fields: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.model_type", "(nothing)", "is missing", f"one of {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        raise ConfigError("model.model_type", model_type, "is not supported", f"one of {', '.join(FAMILIES)}")
    known = set(AutoConfig.for_model(model_type).to_dict()) | set(AutoConfig.for_model(model_type).attribute_map)
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # what transformers called them before version 5
    for name in fields:
        if name not in known:
            import difflib

            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(f"model.{name}", fields[name], f"is not a field of a {model_type} config",
                              f"did you mean `{close[0]}`?" if close else "")  # fmt: skip
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise ConfigError("model", f"({model_type} fields)", f"is refused by transformers: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# from a transformers config to an architecture


def read_architecture(config: PreTrainedConfig) -> Architecture:
    """The switches of a transformers config; refuses families and fields that we do not compute."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError("model.model_type", config.model_type, "is not supported", f"one of {', '.join(FAMILIES)}")
    _refuse(config, "quantization_config", (None,))
    architecture = family(config)
    _check_sizes(architecture)
    return architecture


def _check_sizes(a: Architecture) -> None:
    for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_positions"):
        if getattr(a, name) < 1:
            raise ConfigError(f"model's {name}", getattr(a, name), "must be at least 1")
    for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
        if not 0 <= getattr(a, name) < 1:
            raise ConfigError(f"model's {name}", getattr(a, name), "must be in [0, 1)")
    if a.num_heads % a.num_kv_heads:
        raise ConfigError("model.num_key_value_heads", a.num_kv_heads, f"does not divide num_attention_heads={a.num_heads}")
    if a.rotary and a.head_dim % 2:
        raise ConfigError("model.head_dim", a.head_dim, "is odd and rotary positions turn pairs", f"use {a.head_dim + 1}")


def _refuse(config: PreTrainedConfig, name: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(config, name, allowed[0])
    if value not in allowed:
        words = " or ".join(str(item) for item in allowed)
        raise ConfigError(f"model.{name}", value, "changes the model in a way that is not built", f"only {words} is")


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_fast": "gelu_tanh", "relu": "relu"}  # fmt: skip


def _activation(config: PreTrainedConfig, name: str) -> Any:
    _refuse(config, name, tuple(_ACTIVATIONS))
    return _ACTIVATIONS[getattr(config, name)]


_LLAMA_NAMES = {
    "embedding": Source("model.embed_tokens"),
    "attention_norm": Source("model.layers.{}.input_layernorm"),
    "query": Source("model.layers.{}.self_attn.q_proj"),
    "key": Source("model.layers.{}.self_attn.k_proj"),
    "value": Source("model.layers.{}.self_attn.v_proj"),
    "query_norm": Source("model.layers.{}.self_attn.q_norm"),
    "key_norm": Source("model.layers.{}.self_attn.k_norm"),
    "out": Source("model.layers.{}.self_attn.o_proj"),
    "feedforward_norm": Source("model.layers.{}.post_attention_layernorm"),
    "gate": Source("model.layers.{}.mlp.gate_proj"),
    "up": Source("model.layers.{}.mlp.up_proj"),
    "down": Source("model.layers.{}.mlp.down_proj"),
    "final_norm": Source("model.norm"),
    "head": Source("lm_head"),
}

_QKV = ("query", "key", "value")
_GPT2_NAMES = {
    "embedding": Source("transformer.wte"),
    "positions": Source("transformer.wpe"),
    "attention_norm": Source("transformer.h.{}.ln_1"),
    "query": Source("transformer.h.{}.attn.c_attn", _QKV),
    "key": Source("transformer.h.{}.attn.c_attn", _QKV),
    "value": Source("transformer.h.{}.attn.c_attn", _QKV),
    "out": Source("transformer.h.{}.attn.c_proj"),
    "feedforward_norm": Source("transformer.h.{}.ln_2"),
    "up": Source("transformer.h.{}.mlp.c_fc"),
    "down": Source("transformer.h.{}.mlp.c_proj"),
    "final_norm": Source("transformer.ln_f"),
    "head": Source("lm_head"),
}

_ROPE_TYPES = ("default", "linear", "llama3")


def _llama_like(config: PreTrainedConfig, **switches: Any) -> Architecture:
    """What Llama, Mistral, Qwen2 and Qwen3 have in common."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ConfigError("model.rope_parameters.rope_type", rope_type, "is not built", f"one of {', '.join(_ROPE_TYPES)}")
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("model.rope_parameters.partial_rotary_factor", config.rope_parameters["partial_rotary_factor"],
                          "is not built", "leave it out")  # fmt: skip
    _refuse(config, "pretraining_tp", (1,))
    heads = config.num_attention_heads
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "intermediate_size": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
        "names": _LLAMA_NAMES,
        "norm_eps": config.rms_norm_eps,
        "activation": _activation(config, "hidden_act"),
        "tied": bool(config.tie_word_embeddings),
        "init_std": config.initializer_range,
        "attention_dropout": config.attention_dropout or 0.0,
        "padding_token": _padding_token(config),
        "config": config,
    }
    return Architecture(**(values | switches))


def _padding_token(config: PreTrainedConfig) -> int | None:
    """Counted from the end of the vocabulary where negative, as torch does."""
    token = config.pad_token_id
    if token is not None and not -config.vocab_size <= token < config.vocab_size:
        raise ConfigError("model.pad_token_id", token, f"is outside the vocabulary of {config.vocab_size}",
                          "leave it out: pretraining pads nothing")  # fmt: skip
    return None if token is None else token % config.vocab_size


def _llama(config: PreTrainedConfig) -> Architecture:
    bias = bool(config.attention_bias)
    return _llama_like(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))


def _mistral(config: PreTrainedConfig) -> Architecture:
    return _llama_like(config, windows=(config.sliding_window,) * config.num_hidden_layers)


def _layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError("model.layer_types", kind, "is not built", "full_attention or sliding_attention")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ConfigError("model.layer_types", "sliding_attention", "asks for a window and none is set",
                          "set model.use_sliding_window=true and model.sliding_window")  # fmt: skip
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


def _qwen2(config: PreTrainedConfig) -> Architecture:
    return _llama_like(config, qkv_bias=True, windows=_layer_windows(config))


def _qwen3(config: PreTrainedConfig) -> Architecture:
    bias = bool(config.attention_bias)
    return _llama_like(config, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=_layer_windows(config))


def _gpt2(config: PreTrainedConfig) -> Architecture:
    _refuse(config, "scale_attn_weights", (True,))
    _refuse(config, "scale_attn_by_inverse_layer_idx", (False,))
    _refuse(config, "add_cross_attention", (False,))
    if config.n_embd % config.n_head:
        raise ConfigError("model.n_head", config.n_head, f"does not divide n_embd={config.n_embd}")
    return Architecture(
        model_type="gpt2",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        max_positions=config.n_positions,
        names=_GPT2_NAMES,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=_activation(config, "activation_function"),
        gated=False,
        rotary=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(config.tie_word_embeddings),
        transposed=True,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range / (2 * config.n_layer) ** 0.5,
        embedding_dropout=config.embd_pdrop,
        residual_dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        config=config,
    )


FAMILIES: dict[str, Callable[[Any], Architecture]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
