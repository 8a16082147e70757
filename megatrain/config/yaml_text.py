"""YAML for settings: `3e-4` is a number and duplicate keys are errors."""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatrain.errors import truncate


def parse(text: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        yaml.YAMLError: if the text is not valid.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """Returns the problem with its line and column."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return (
        f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
        if mark and problem
        else " ".join(str(error).split())
    )


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML loader; reads 3e-4 as a number, unlike YAML 1.1, and refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:  # before `<<` adds keys, which may repeat
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None, None, "a key must be text, not a list or mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError) as error:  # such as the date 2024-13-45
            raise yaml.constructor.ConstructorError(
                None, None, f"{truncate(node.value)!r} cannot be read ({error})", node.start_mark
            ) from None


def _add_float_resolver() -> None:
    pattern = re.compile(
        r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    )
    _YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_add_float_resolver()
