"""What a Hugging Face config means for our layers: one dataclass of switches, filled by one small file a family.

A field of the config that changes the maths is honoured or refused by name, never ignored. docs/families.md says how to add a
family.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatrain.config.schema import Problem
from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "starcoder2",
)
"""Each is a `model_type` of transformers and a file of `families/`."""


class WeightName(NamedTuple):
    """Where a role's tensors are in a checkpoint.

    `name` has `{}` for the layer's index and no `.weight` or `.bias`. `fused` lists the roles that share the tensor, in their
    order along the output features. With `by_head` the order is repeated for each key-value head: its queries, its key, its
    value.
    """

    name: str
    fused: tuple[str, ...] = ()
    by_head: bool = False


@dataclass(frozen=True)
class ClassificationHeadConfig:
    """A head that tells labels instead of tokens: of each text at its last token, or of words. `name` is its matrix's in a checkpoint."""

    num_labels: int
    of_tokens: bool
    problem: Problem
    name: str = "score"
    bias: bool = False
    dropout: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TransformerConfig:
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
    names: dict[str, WeightName]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    """A norm multiplies by 1 + its weight, which starts at zero."""
    norm_before: bool = True
    """A norm before each residual branch."""
    norm_after: bool = False
    """A norm after each residual branch, before its sum."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the block's input, instead of one the other's sum."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, rounded to their dtype."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    rotary: bool = True
    """Queries and keys are turned by their positions; else positions are learned and added to the embedding."""
    rotary_dim: int | None = None
    """The first dims of each head that turn; None turns all."""
    rope_kinds: tuple[str | None, ...] = ()
    """Of each layer, the key of its own entry in the config's rope_parameters; None where all layers turn alike."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    """An RMS norm of queries and of keys, over each head's dims or over all heads together."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: head_dim ** -0.5."""
    attention_cap: float | None = None
    """Scores x become cap * tanh(x / cap)."""
    logit_cap: float | None = None
    """The same of the head's logits."""
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
    former_names: dict[str, str] = field(default_factory=dict)
    """Of tensors that older checkpoints name otherwise: from the old name to the new."""
    classifier: ClassificationHeadConfig | None = None
    """In the vocabulary's place, where the model is a classifier."""
    config: Any = field(default=None, repr=False, compare=False)
    """The transformers config itself."""

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rope_kind(self, layer: int) -> str | None:
        return self.rope_kinds[layer] if self.rope_kinds else None


# ---------------------------------------------------------------------------------------------------------------------
# from what the user wrote to a transformers config


def load_hf_config(model: str | dict[str, Any]) -> PreTrainedConfig:
    """The transformers config that a run's `model:` names: a folder, a config.json, or inline fields."""
    from transformers import AutoConfig

    if isinstance(model, dict):
        return _inline_config(model)
    if not model:
        raise ConfigError(
            "model",
            "(nothing)",
            "is missing",
            "give a folder, a config.json, or fields with model_type",
        )
    path = Path(model)
    if not path.exists():
        raise ConfigError(
            "model",
            model,
            "does not exist",
            "give a folder, a config.json, or fields with model_type",
        )
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ConfigError(
            "model",
            model,
            f"is not a readable Hugging Face config: {_one_line(error)}",
            "give a folder, a config.json, or fields with model_type",
        ) from error


def _inline_config(fields: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    fields = copy.deepcopy(fields)  # transformers writes into what it is given
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(
            "model.model_type",
            "(nothing)",
            "is missing",
            f"one of {', '.join(FAMILIES)}",
            fix={"model.model_type": "llama"},
        )
    if model_type not in FAMILIES:
        raise ConfigError(
            "model.model_type",
            model_type,
            "is not supported",
            f"one of {', '.join(FAMILIES)}",
            fix={
                "model.model_type": next(
                    iter(difflib.get_close_matches(str(model_type), FAMILIES, 1)), "llama"
                )
            },
        )
    plain = AutoConfig.for_model(model_type)
    known = set(plain.to_dict()) | set(plain.attribute_map) | _family(model_type).OLD_FIELDS
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(
                f"model.{name}",
                fields[name],
                f"is not a field of a {model_type} config",
                f"did you mean `{close[0]}`?" if close else "",
                fix={f"model.{close[0]}": fields[name]} if close else None,
            )
    _refuse_below_one(fields, plain.attribute_map)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise ConfigError(
            "model",
            f"({model_type} fields)",
            f"is refused by transformers: {_one_line(error)}",
            "change the field that it names",
        ) from error


_MOST_LAYERS = 100_000
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


def _refuse_below_one(fields: Mapping[str, Any], spelt: Mapping[str, str]) -> None:
    """Refuse fields that count something and count nothing: some would be divided by, and some taken for one that is left out."""
    for name in _COUNTS:
        for written in (name, spelt.get(name, name)):
            value = fields.get(written)
            if isinstance(value, int | float) and value < 1:
                raise ConfigError(
                    f"model.{written}", value, "must be at least 1", fix={f"model.{written}": 1}
                )


def _family(model_type: str) -> Any:
    """The family's file: `read(fields)` makes the architecture, `OLD_FIELDS` are what transformers' older configs called things."""
    return importlib.import_module(f"megatrain.models.hf.{model_type}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# from a transformers config to an architecture


def read_config(config: PreTrainedConfig) -> TransformerConfig:
    """The switches of a transformers config; refuses families and fields that we do not compute."""
    from megatrain.models.hf_reader import HFConfigReader

    if config.model_type not in FAMILIES:
        raise ConfigError(
            "model.model_type",
            config.model_type,
            "is not supported",
            f"one of {', '.join(FAMILIES)}",
        )
    spelt = [config.attribute_map.get(name, name) for name in _COUNTS]
    _refuse_below_one({name: getattr(config, name, None) for name in spelt}, config.attribute_map)
    fields = HFConfigReader(config)
    architecture = _family(config.model_type).read(fields)
    fields.refuse_unread()
    _check_sizes(architecture)
    return architecture


def _check_sizes(a: TransformerConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "max_positions",
    ):
        if getattr(a, name) < 1:
            raise ConfigError(
                f"model's {name}",
                getattr(a, name),
                "must be at least 1",
                "change the field in model",
            )
    if a.num_layers > _MOST_LAYERS:
        raise ConfigError(
            "model.num_hidden_layers",
            a.num_layers,
            f"is more than {_MOST_LAYERS:,}",
            fix={"model.num_hidden_layers": _MOST_LAYERS},
        )
    for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
        if not 0 <= getattr(a, name) < 1:
            raise ConfigError(
                f"model's {name}",
                getattr(a, name),
                "must be in [0, 1)",
                "change the field in model",
            )
    if not a.norm_eps >= 0:
        raise ConfigError(
            "model's norm_eps", a.norm_eps, "must be at least 0", "use for example 1e-5"
        )
    if a.num_heads % a.num_kv_heads:
        raise ConfigError(
            "model.num_key_value_heads",
            a.num_kv_heads,
            f"does not divide num_attention_heads={a.num_heads}",
            fix={
                "model.num_key_value_heads": max(
                    n for n in range(1, a.num_kv_heads + 1) if a.num_heads % n == 0
                )
            },
        )
    if a.rotary and a.rotary_dim is None and a.head_dim % 2:
        raise ConfigError(
            "model.head_dim",
            a.head_dim,
            "is odd and rotary positions turn pairs",
            f"use {a.head_dim + 1}",
            fix={"model.head_dim": a.head_dim + 1},
        )
    if a.rotary_dim is not None and (a.rotary_dim % 2 or not 0 < a.rotary_dim <= a.head_dim):
        raise ConfigError(
            "model.rope_parameters.partial_rotary_factor",
            a.rotary_dim / a.head_dim,
            f"turns {a.rotary_dim} dims of each head, and rotary positions turn pairs",
            fix={"model.rope_parameters.partial_rotary_factor": 1.0},
        )


class FieldDifference(NamedTuple):
    """A field of a config that another has otherwise."""

    name: str
    there: Any
    here: Any


_SAYS_NOTHING = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[FieldDifference]:
    """The fields in which a config, as it was read from JSON, is of another model than `here`."""
    ours = json.loads(json.dumps(here, default=str))
    names = sorted(set(ours) | set(there))
    return [
        FieldDifference(name, there.get(name), ours.get(name))
        for name in names
        if name not in _SAYS_NOTHING and there.get(name) != ours.get(name)
    ]
