"""The supported model families: one file for each `model_type`, loaded on first use.

A family is a function that reads a transformers config and returns a `TransformerConfig`. Each
built-in family is a file of this package with that function, `read`, and `OLD_FIELDS`.
`register_family` adds others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatrain.models.config import TransformerConfig
    from megatrain.models.hf_reader import HFConfigReader

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
"""The built-in families, as transformers' `model_type`."""

Reader = Callable[["HFConfigReader"], "TransformerConfig"]


class Family(NamedTuple):
    """A model family.

    Attributes:
        read: returns the transformer config of a Hugging Face config.
        old_fields: fields of inline configs that transformers has renamed and still accepts.
    """

    read: Reader
    old_fields: frozenset[str]


_registered: dict[str, Family] = {}


def register_family(
    model_type: str, reader: Reader, *, old_fields: frozenset[str] = frozenset()
) -> None:
    """Registers a model family, or replaces one, for this process.

    The family's config class must be known to transformers (`AutoConfig.register` for a class of
    your own). Register the family in a module that every rank imports before it calls `train`.

    Args:
        model_type: the config's `model_type`.
        reader: receives an `HFConfigReader` and returns the `TransformerConfig`. Fields that it
            does not read must have their default values; otherwise the config is refused.
        old_fields: names that transformers accepts in inline configs although the config class has
            renamed them.

    Raises:
        ValueError: if the model type is empty.

    Example:
        A Llama with biases on query, key and value:

            from megatrain.models.hf import register_family
            from megatrain.models.hf.llama import llama_like

            register_family("my_llama", lambda fields: llama_like(fields, qkv_bias=True))
    """
    if not model_type:
        raise ValueError("model_type must not be empty")
    _registered[model_type] = Family(reader, old_fields)


def supported_families() -> tuple[str, ...]:
    """Returns the model types of all built-in and registered families."""
    return tuple(dict.fromkeys([*FAMILIES, *_registered]))


def find_family(model_type: str) -> Family | None:
    """Returns the family of a model type; None if it is not supported."""
    if model_type in _registered:
        return _registered[model_type]
    if model_type not in FAMILIES:
        return None
    module = importlib.import_module(f"{__name__}.{model_type}")
    return Family(module.read, module.OLD_FIELDS)
