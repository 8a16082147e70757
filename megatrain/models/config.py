"""The transformer config: sizes and switches of our layers, read from a Hugging Face config.

A field of the Hugging Face config that changes the computation is honoured or refused by name,
never ignored. docs/families.md describes how to add a family.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatrain.config.schema import Problem
from megatrain.errors import ConfigError
from megatrain.models.hf import Family, find_family, supported_families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class WeightName(NamedTuple):
    """The tensors of a role in a Hugging Face checkpoint.

    Attributes:
        name: with `{}` for the layer's index and without `.weight` or `.bias`.
        fused: the roles that share the tensor, in their order along the output features.
        by_head: True if that order repeats for each key-value head: its queries, its key, its
            value.
    """

    name: str
    fused: tuple[str, ...] = ()
    by_head: bool = False


@dataclass(frozen=True)
class ClassificationHeadConfig:
    """A classification head, of texts (at their last token) or of tokens.

    Attributes:
        name: its matrix in a checkpoint, without `.weight`.
    """

    num_labels: int
    of_tokens: bool
    problem: Problem
    name: str = "score"
    bias: bool = False
    dropout: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder: sizes of the unsharded model, and the switches in which families differ."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    names: dict[str, WeightName]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    """A norm multiplies by 1 + its weight, which starts at zero."""
    pre_norm: bool = True
    """A norm at the start of each residual branch."""
    post_norm: bool = False
    """A norm at the end of each residual branch, before its sum."""
    parallel_residual: bool = False
    """Attention and MLP both read the block's input; otherwise the MLP reads attention's sum."""
    embedding_scale: float | None = None
    """Factor on embeddings, rounded to their dtype."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    rotary: bool = True
    """Rotary positions; otherwise positions are learned and added to the embedding."""
    rotary_dim: int | None = None
    """Number of leading dims of each head that rotate; None for all."""
    rope_kinds: tuple[str | None, ...] = ()
    """The key of each layer's entry in the config's rope_parameters; empty if layers do not
    differ."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and of keys, over each head or over all heads together."""
    attention_scale: float | None = None
    """Factor on attention scores; None for head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Soft cap c of attention scores x: c * tanh(x / c)."""
    logit_softcap: float | None = None
    """Soft cap of the head's logits."""
    tied: bool = False
    padding_token: int | None = None
    """Torch's padding_idx: its embedding starts at zero and gets no gradient from the input."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens; None attends to all previous tokens."""
    transposed: bool = False
    """Matrices are stored as [in, out]."""
    init_std: float = 0.02
    residual_init_std: float | None = None
    """Standard deviation of the linears that end a residual branch; None for `init_std`."""
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    renamed_weights: dict[str, str] = field(default_factory=dict)
    """New names of tensors by the name that older checkpoints use."""
    classifier: ClassificationHeadConfig | None = None
    """Classification head that replaces the LM head."""
    config: Any = field(default=None, repr=False, compare=False)
    """The transformers config."""

    def window(self, layer: int) -> int | None:
        """Returns the sliding window of a layer, or None."""
        return self.windows[layer] if self.windows else None

    def rope_kind(self, layer: int) -> str | None:
        """Returns the key of a layer's entry in rope_parameters, or None."""
        return self.rope_kinds[layer] if self.rope_kinds else None


# --------------------------------------------------------------------------------------------------
# settings -> transformers config

_MODEL_HINT = "give a folder, a config.json, or fields with model_type"


def load_hf_config(model: str | dict[str, Any]) -> PreTrainedConfig:
    """Returns the transformers config of the setting `model`: a folder, a config.json, or inline
    fields.

    Raises:
        ConfigError: if the path or a field is missing, unknown or invalid.
    """
    from transformers import AutoConfig

    if isinstance(model, dict):
        return _inline_config(model)
    if not model:
        raise ConfigError("model", "(nothing)", "is missing", _MODEL_HINT)
    path = Path(model)
    if not path.exists():
        raise ConfigError("model", model, "does not exist", _MODEL_HINT)
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ConfigError(
            "model",
            model,
            f"is not a readable Hugging Face config: {_one_line(error)}",
            _MODEL_HINT,
        ) from error


def _inline_config(fields: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    fields = copy.deepcopy(fields)  # transformers modifies its arguments
    model_type = fields.pop("model_type", None)
    if model_type is None:
        hint = f"one of {', '.join(supported_families())}"
        raise ConfigError(
            "model.model_type", "(nothing)", "is missing", hint, fix={"model.model_type": "llama"}
        )
    family = _family(model_type)
    defaults = AutoConfig.for_model(model_type)
    known = set(defaults.to_dict()) | set(defaults.attribute_map) | family.old_fields
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(
                f"model.{name}",
                fields[name],
                f"is not a field of a {model_type} config",
                f"did you mean `{close[0]}`?" if close else "leave it out",
                fix={f"model.{close[0]}": fields[name]} if close else None,
            )
    _refuse_below_one(fields, defaults.attribute_map)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise ConfigError(
            "model",
            f"({model_type} fields)",
            f"is refused by transformers: {_one_line(error)}",
            "correct or leave out the field that it names",
        ) from error


def _family(model_type: str) -> Family:
    family = find_family(model_type)
    if family is None:
        families = supported_families()
        close = difflib.get_close_matches(str(model_type), families, n=1)
        raise ConfigError(
            "model.model_type",
            model_type,
            f"is not supported (supported: {', '.join(families)})",
            fix={"model.model_type": close[0] if close else "llama"},
        )
    return family


_MAX_LAYERS = 100_000
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "max_position_embeddings",
    "sliding_window",
)


def _refuse_below_one(fields: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
    """Raises ConfigError for counts below 1: readers divide by some, and treat some as missing."""
    for name in _COUNTS:
        for alias in (name, attribute_map.get(name, name)):
            value = fields.get(alias)
            if isinstance(value, int | float) and value < 1:
                raise ConfigError(
                    f"model.{alias}", value, "must be at least 1", fix={f"model.{alias}": 1}
                )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# transformers config -> transformer config


def read_config(config: PreTrainedConfig) -> TransformerConfig:
    """Returns the transformer config of a transformers config.

    Raises:
        ConfigError: for families that are not supported, and for fields whose value is not.
    """
    from megatrain.models.hf_reader import HFConfigReader

    family = _family(config.model_type)
    aliases = [config.attribute_map.get(name, name) for name in _COUNTS]
    _refuse_below_one({name: getattr(config, name, None) for name in aliases}, config.attribute_map)
    fields = HFConfigReader(config)
    architecture = family.read(fields)
    fields.refuse_unread()
    _check_sizes(architecture)
    _check_heads(architecture)
    return architecture


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_positions",
)


def _check_sizes(a: TransformerConfig) -> None:
    for name in _SIZES:
        if getattr(a, name) < 1:
            hint = "change the model fields that it follows from"
            raise ConfigError(f"model's {name}", getattr(a, name), "must be at least 1", hint)
    if a.num_layers > _MAX_LAYERS:
        name = "model.num_hidden_layers"
        raise ConfigError(
            name, a.num_layers, f"must be at most {_MAX_LAYERS:,}", fix={name: _MAX_LAYERS}
        )
    for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
        if not 0 <= getattr(a, name) < 1:
            raise ConfigError(
                f"model's {name}", getattr(a, name), "must be in [0, 1)", "0 disables it"
            )
    if not a.norm_eps >= 0:
        raise ConfigError(
            "model's norm_eps", a.norm_eps, "must be at least 0", "usual are 1e-5 and 1e-6"
        )


def _check_heads(a: TransformerConfig) -> None:
    if a.num_heads % a.num_kv_heads:
        divisors = (n for n in range(a.num_kv_heads, 0, -1) if a.num_heads % n == 0)
        raise ConfigError(
            "model.num_key_value_heads",
            a.num_kv_heads,
            f"must divide num_attention_heads={a.num_heads}",
            fix={"model.num_key_value_heads": next(divisors)},
        )
    if a.rotary and a.rotary_dim is None and a.head_dim % 2:
        raise ConfigError(
            "model.head_dim",
            a.head_dim,
            "must be even, because rotary positions rotate pairs of dims",
            fix={"model.head_dim": a.head_dim + 1},
        )
    if a.rotary_dim is not None and (a.rotary_dim % 2 or not 0 < a.rotary_dim <= a.head_dim):
        raise ConfigError(
            "model.rope_parameters.partial_rotary_factor",
            a.rotary_dim / a.head_dim,
            f"must rotate an even number of dims of each head, and rotates {a.rotary_dim}",
            f"{a.head_dim} dims times the factor must be even and at most {a.head_dim}",
            fix={"model.rope_parameters.partial_rotary_factor": 1.0},
        )


class FieldDifference(NamedTuple):
    """A field in which two configs differ."""

    name: str
    other: Any
    ours: Any


_NO_EFFECT = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


def differences(other: dict[str, Any], ours: dict[str, Any]) -> list[FieldDifference]:
    """Returns the fields in which `other`, read from JSON, describes another model than `ours`."""
    ours = json.loads(json.dumps(ours, default=str))
    return [
        FieldDifference(name, other.get(name), ours.get(name))
        for name in sorted(set(ours) | set(other))
        if name not in _NO_EFFECT and other.get(name) != ours.get(name)
    ]
