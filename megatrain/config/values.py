"""Conversion of YAML values to the types of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
import types
import typing
from typing import Any, Literal

from megatrain.config.schema import Config
from megatrain.errors import ConfigError, truncate

_LARGEST_INT = 2**63 - 1

_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


def setting_types() -> dict[str, Any]:
    """Returns the type of each setting by its `section.key`, or name if it is in no section."""
    found: dict[str, Any] = {}
    for name, section in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(section):
            hints = typing.get_type_hints(section)
            found |= {f"{name}.{key}": hint for key, hint in hints.items()}
        else:
            found[name] = section
    return found


def convert_value(name: str, value: Any, expected: Any) -> Any:
    """Returns `value` as the type `expected`, if that loses nothing (2 to 2.0, 100.0 to 100).

    Raises:
        ConfigError: for any other value.
    """
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for option in options:
        if _accepts(option, value):
            return _converted(name, value, option)
    for option in options:
        if typing.get_origin(option) is Literal:
            raise _not_a_choice(name, value, [str(choice) for choice in typing.get_args(option)])
    found = _TYPE_NAMES.get(type(value), type(value).__name__)
    requirement = f"must be {type_name(expected)}, not {found}"
    raise ConfigError(name, truncate(value), requirement, fix=_example_fix(name, value))


def _accepts(option: Any, value: Any) -> bool:
    kind = typing.get_origin(option) or option
    if kind is Literal:
        choices = typing.get_args(option)
        is_off = value is False and "off" in choices  # YAML reads `off` as false
        return is_off or (not isinstance(value, bool) and value in choices)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return _accepts(float, value) and value == value // 1
    return isinstance(value, kind)


def _converted(name: str, value: Any, option: Any) -> Any:
    kind = typing.get_origin(option) or option
    if kind is Literal:
        return "off" if value is False else next(c for c in typing.get_args(option) if c == value)
    if kind is float:
        if not abs(value) <= sys.float_info.max:
            fix = _example_fix(name, value)
            raise ConfigError(name, truncate(value), "must be a finite number", fix=fix)
        return float(value)
    if kind is int:
        if not -_LARGEST_INT <= value <= _LARGEST_INT:
            requirement = f"must be at most {_LARGEST_INT}"
            raise ConfigError(name, truncate(value), requirement, fix=_example_fix(name, value))
        return int(value)
    if kind is list:
        (inner,) = typing.get_args(option)
        return [convert_value(f"{name}[{i}]", item, inner) for i, item in enumerate(value)]
    return value


def _not_a_choice(name: str, value: Any, choices: list[str]) -> ConfigError:
    similar = closest(str(value), choices)
    return ConfigError(
        name,
        truncate(value),
        f"must be one of {', '.join(choices)}",
        f"did you mean `{similar}`?" if similar and similar != str(value) else "",
        fix={name: _parsed(similar)} if similar else _example_fix(name, value),
    )


def _parsed(choice: str) -> str | int:
    return int(choice) if choice.isdecimal() else choice


def _example_fix(name: str, value: Any) -> dict[str, Any]:
    """Returns the fix for a value that cannot be converted: the number in a text or the default."""
    name = name.partition("[")[0]
    if isinstance(value, str):
        with contextlib.suppress(ValueError, ConfigError):
            return {name: convert_value(name, float(value), setting_types()[name])}
    if name == "train.steps":
        return {name: 1000}
    if name == "model":
        return {}
    section, _, key = name.partition(".")
    default = getattr(Config(), section)
    return {name: getattr(default, key) if key else default}


def closest(word: str, known: list[str]) -> str | None:
    """Returns the known name most similar to `word`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def type_name(expected: Any) -> str:
    """Returns the name of a type, such as "a whole number or null"."""
    if isinstance(expected, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(expected))
    if typing.get_origin(expected) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(expected))
    kind = typing.get_origin(expected) or expected
    return _TYPE_NAMES.get(kind, str(kind))
