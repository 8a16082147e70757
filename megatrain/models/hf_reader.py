"""Reads transformers configs field by field, and refuses fields that nothing has read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from megatrain.errors import ConfigError, format_value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WITHOUT_EFFECT = frozenset(
    {
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "use_cache",
        "problem_type",
        "id2label",
        "label2id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "chunk_size_feed_forward",
    }
)
"""Fields that do not affect the training of a decoder: names, class labels, outputs and caches."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_ROPE_TYPES = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
        }
    ),
}
"""Fields of each scaling, beside rope_theta and partial_rotary_factor."""

_ROPE_NUMBERS = frozenset(
    {
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
    }
)
"""Fields that must be positive; transformers checks none of them."""

OLD_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling"})
"""Fields that transformers 5 has moved into rope_parameters."""


def _defaults(kind: type) -> dict[str, Any]:
    """Returns the default of each field of a config class."""
    if dataclasses.is_dataclass(kind):
        return {
            field.name: field.default
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING
        }
    return kind().to_dict()


class HFConfigReader:
    """A transformers config that records which of its fields are read.

    So no field is ignored silently, including those that a later transformers adds: unless it has
    its default value, `refuse_unread` names it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._read: set[str] = set()
        self.only("quantization_config", None)
        self.only("is_encoder_decoder", False)

    def __getattr__(self, name: str) -> Any:
        self._read.add(self.config.attribute_map.get(name, name))
        return getattr(self.config, name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or `default` if this version of the config class lacks it."""
        return getattr(self, name) if hasattr(self.config, name) else default

    def only(self, name: str, *supported: Any) -> None:
        """Raises ConfigError for any other value of a field."""
        value = self.get(name, supported[0])
        if value not in supported:
            values = ", ".join(format_value(item) for item in supported)
            raise ConfigError(
                f"model.{name}",
                value,
                f"is not supported (supported: {values})",
                fix={f"model.{name}": supported[0]},
            )

    def without_effect(self, *names: str) -> None:
        """Marks fields as read that have no effect here, such as those of other heads."""
        self._read.update(names)

    def activation(self, name: str) -> Any:
        """Returns the activation that a field names."""
        self.only(name, *_ACTIVATIONS)
        return _ACTIVATIONS[getattr(self, name)]

    def padding_token(self) -> int | None:
        """Returns the padding token; as in torch, negative ids count from the vocabulary's end."""
        token = self.pad_token_id
        if token is not None and not -self.vocab_size <= token < self.vocab_size:
            raise ConfigError(
                "model.pad_token_id",
                token,
                f"is outside the vocabulary of {self.vocab_size}",
                "pretraining needs no padding token",
                fix={"model.pad_token_id": None},
            )
        return None if token is None else token % self.vocab_size

    def layer_windows(self) -> tuple[int | None, ...]:
        """Returns the window of each layer, from `layer_types` and `sliding_window`."""
        window = self.sliding_window
        kinds = ("full_attention", "sliding_attention")
        for kind in self.layer_types:
            if kind not in kinds:
                raise ConfigError(
                    "model.layer_types", kind, "is not supported", f"use {' or '.join(kinds)}"
                )
        if "sliding_attention" in self.layer_types and window is None:
            raise ConfigError(
                "model.layer_types",
                "sliding_attention",
                "requires a window, and none is set",
                "set model.use_sliding_window=true and model.sliding_window",
            )
        return tuple(window if kind == "sliding_attention" else None for kind in self.layer_types)

    def check_rope(self, kind: str | None = None, *, partial: bool = False) -> float:
        """Raises ConfigError for scalings that `rope.py` lacks; returns the rotating share of a
        head.

        Args:
            kind: the key of a kind of layer in rope_parameters, if each has its own entry.
            partial: the family supports a share below 1.
        """
        setting = "model.rope_parameters" if kind is None else f"model.rope_parameters.{kind}"
        parameters = self.rope_parameters if kind is None else self.rope_parameters[kind]
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f"{setting}.rope_type",
                rope_type,
                f"is not supported (supported: {', '.join(_ROPE_TYPES)})",
                fix={
                    setting: {
                        "rope_type": "default",
                        "rope_theta": parameters.get("rope_theta", 1e4),
                    }
                },
            )
        _check_rope_fields(setting, rope_type, parameters)
        share = parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not partial:
            name = f"{setting}.partial_rotary_factor"
            raise ConfigError(
                name, share, f"must be 1 in {self.model_type} models", fix={name: 1.0}
            )
        return share

    def refuse_unread(self) -> None:
        """Raises ConfigError for a field that was not read and does not have its default value."""
        for name, default in _defaults(type(self.config)).items():
            if name in self._read or name in WITHOUT_EFFECT or name.startswith("_"):
                continue
            value = getattr(self.config, name, default)
            if value != default:
                raise ConfigError(
                    f"model.{name}",
                    value,
                    f"is not supported in {self.config.model_type} models "
                    f"(supported: {format_value(default)})",
                    fix={f"model.{name}": default},
                )


def _check_rope_fields(setting: str, rope_type: str, parameters: dict[str, Any]) -> None:
    supported = _ROPE_TYPES[rope_type] | {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
    }
    for name, value in parameters.items():
        if name not in supported:
            raise ConfigError(
                f"{setting}.{name}",
                value,
                f"is not read by rope_type={rope_type}",
                "leave it out",
                fix={setting: {key: parameters[key] for key in parameters if key in supported}},
            )
        if name in _ROPE_NUMBERS and value is not None:
            is_number, hint = isinstance(value, int | float), "copy it from the model's config.json"
            if name == "factor" and not (is_number and value >= 1):
                raise ConfigError(
                    f"{setting}.{name}",
                    value,
                    "must be a number of at least 1",
                    hint,
                    fix={f"{setting}.{name}": 1.0},
                )
            if not (is_number and value > 0):
                raise ConfigError(
                    f"{setting}.{name}",
                    value,
                    "must be a number above 0",
                    hint,
                    fix={f"{setting}.{name}": 1.0},
                )
