"""YAML as settings are written in it: 3e-4 is a number, a key is given once, and whatever cannot be read is one kind of error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatrain.errors import truncate


def parse(text: str) -> Any:
    """YAML's value of a text; yaml.YAMLError for whatever is none."""
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """What is wrong with a text, and where."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return (
        f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
        if mark and problem
        else " ".join(str(error).split())
    )


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4) and a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:  # here, before `<<` brings in keys that may be given once more
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None, None, "a list or mapping stands where a name should", key.start_mark
                )
            if key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            TypeError,
            AttributeError,
        ) as error:  # 2024-13-45 looks like a date, and is none
            raise yaml.constructor.ConstructorError(
                None, None, f"{truncate(node.value)!r} cannot be read ({error})", node.start_mark
            ) from None


def _add_float_resolver() -> None:
    pattern = re.compile(
        r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    )
    _YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_add_float_resolver()
