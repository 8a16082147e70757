"""The fields of a transformers config as the families read them: each is honoured or refused, and what nobody read is refused."""

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
"""What says nothing about the maths of training a decoder: names, labels of classes, what is returned and kept."""

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
"""What each scaling reads beside rope_theta and partial_rotary_factor."""

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
"""Of those, the ones that rotations are multiplied or divided by; transformers warns at most."""

OLD_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling"})
"""What is in rope_parameters since version 5 of transformers."""


def _check_rope_number(setting: str, value: Any, *, from_1: bool) -> None:
    if value is not None and not (
        isinstance(value, int | float) and (value >= 1 if from_1 else value > 0)
    ):
        raise ConfigError(
            setting,
            value,
            "must be a number from 1 on" if from_1 else "must be a number above 0",
            fix={setting: 1.0},
        )


def _defaults(kind: type) -> dict[str, Any]:
    """What a config class says when nothing is given, by field."""
    if dataclasses.is_dataclass(kind):
        return {
            field.name: field.default
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING
        }
    return kind().to_dict()


class HFConfigReader:
    """A transformers config that remembers what was read of it.

    A field that a family does not read cannot be ignored silently, also one that a later transformers adds: unless it stands at
    its default, `refuse_unread` names it.
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
        """The field, where this version of the config has it."""
        return getattr(self, name) if hasattr(self.config, name) else default

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any other value of a field."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            words = " or ".join(format_value(item) for item in allowed)
            raise ConfigError(
                f"model.{name}",
                value,
                "changes the model in a way that is not built",
                f"only {words} is",
                fix={f"model.{name}": allowed[0]},
            )

    def without_effect(self, *names: str) -> None:
        """Fields of other heads than the language model's."""
        self._read.update(names)

    def activation(self, name: str) -> Any:
        self.only(name, *_ACTIVATIONS)
        return _ACTIVATIONS[getattr(self, name)]

    def padding_token(self) -> int | None:
        """Counted from the end of the vocabulary where negative, as torch does."""
        token = self.pad_token_id
        if token is not None and not -self.vocab_size <= token < self.vocab_size:
            raise ConfigError(
                "model.pad_token_id",
                token,
                f"is outside the vocabulary of {self.vocab_size}",
                "leave it out: pretraining pads nothing",
                fix={"model.pad_token_id": None},
            )
        return None if token is None else token % self.vocab_size

    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, from its type."""
        window = self.sliding_window
        for kind in self.layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    "model.layer_types", kind, "is not built", "full_attention or sliding_attention"
                )
        if "sliding_attention" in self.layer_types and window is None:
            raise ConfigError(
                "model.layer_types",
                "sliding_attention",
                "asks for a window and none is set",
                "set model.use_sliding_window=true and model.sliding_window",
            )
        return tuple(window if kind == "sliding_attention" else None for kind in self.layer_types)

    def check_rope(self, kind: str | None = None, *, partial: bool = False) -> float:
        """Refuse what the rotations of `rotary` do not know; returns the share of a head's dims that turn."""
        where = "model.rope_parameters" if kind is None else f"model.rope_parameters.{kind}"
        parameters = self.rope_parameters if kind is None else self.rope_parameters[kind]
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f"{where}.rope_type",
                rope_type,
                "is not built",
                f"one of {', '.join(_ROPE_TYPES)}",
                fix={
                    where: {"rope_type": "default", "rope_theta": parameters.get("rope_theta", 1e4)}
                },
            )
        for name in parameters:
            if name not in _ROPE_TYPES[rope_type] | {
                "rope_type",
                "type",
                "rope_theta",
                "partial_rotary_factor",
            }:
                raise ConfigError(
                    f"{where}.{name}",
                    parameters[name],
                    f"is not read by rope_type={rope_type}",
                    fix={where: {key: parameters[key] for key in parameters if key != name}},
                )
            if name in _ROPE_NUMBERS:
                _check_rope_number(f"{where}.{name}", parameters[name], from_1=name == "factor")
        share = parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not partial:
            raise ConfigError(
                f"{where}.partial_rotary_factor",
                share,
                f"is not built for {self.model_type}",
                "leave it out",
                fix={f"{where}.partial_rotary_factor": 1.0},
            )
        return share

    def refuse_unread(self) -> None:
        """Refuse a field of the config's class that no family's line has read and that says something."""
        for name, default in _defaults(type(self.config)).items():
            if name in self._read or name in WITHOUT_EFFECT or name.startswith("_"):
                continue
            value = getattr(self.config, name, default)
            if value != default:
                raise ConfigError(
                    f"model.{name}",
                    value,
                    f"is a field of {self.config.model_type} configs that is not built",
                    f"only {format_value(default)} is",
                    fix={f"model.{name}": default},
                )
