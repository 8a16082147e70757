"""From an error to the line that mends it: words `section.key=value` to lay over the config, or a command.

An error's way out is a sentence for people, in few forms: a setting with its value, numbers or names that work, `for example X`,
`leave it out`, `did you mean X`. What it does not say is the setting's default.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from typing import Any

import yaml

from megatrain.config.loader import Config
from megatrain.errors import ConfigError, UserError

_WORD = re.compile(r"\b[a-z_]+\.[a-z_]+=(?:\"[^\"]*\"|\[[^\]]*\]|[^\s,;()]+)")
_MEANT = re.compile(r"did you mean `?([^`?]+)`?\?")
_EXAMPLE = re.compile(r"for example (\[[^\]]*\]|[^\s,;]+)")
_USE = re.compile(
    r"\b(?:use|give|set|write it as) (?:at most |one of |a multiple of )?(\"[^\"]*\"|[^\s,;]+)"
)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])")


def fix_for(error: UserError) -> str:
    """What to paste behind the command, or instead of it; empty where nothing is known to mend it."""
    if error.fix_text:
        return error.fix_text
    if not isinstance(error, ConfigError):
        return next(iter(_WORD.findall(str(error).rpartition("; ")[2])), "")
    for rule in (_misspelt, _named, _left_out, _example, _number, _used, _default):
        if line := rule(error):
            return line
    return ""


def _misspelt(error: ConfigError) -> str:
    meant = _MEANT.search(error.hint)
    if meant is None:
        return ""
    if "is not a setting" not in error.requirement and "is not a field" not in error.requirement:
        return "" if "section" in error.requirement else f"{error.setting}={meant[1]}"
    return f"{error.setting.rpartition('.')[0]}.{meant[1]}={error.value}"


def _named(error: ConfigError) -> str:
    return next(iter(_WORD.findall(error.hint)), "").rstrip(".")


def _left_out(error: ConfigError) -> str:
    return (
        _default(error)
        if "leave it out" in error.hint or f"leave {error.setting} out" in error.hint
        else ""
    )


def _example(error: ConfigError) -> str:
    found = _EXAMPLE.search(error.hint)
    return (
        f"{error.setting}={found[1].replace(', ', ',')}"
        if found and _is_setting(error.setting)
        else ""
    )


def _number(error: ConfigError) -> str:
    """Of the numbers that work, the nearest."""
    numbers = [float(text) for text in _NUMBER.findall(error.hint)]
    if not numbers or isinstance(error.value, bool) or not isinstance(error.value, int | float):
        return ""
    value = error.value
    return f"{error.setting}={min(numbers, key=lambda number: (abs(number - value), number)):g}"


def _used(error: ConfigError) -> str:
    found = _USE.search(error.hint)
    return f"{error.setting}={found[1]}" if found and _fits(error.setting, found[1]) else ""


def _default(error: ConfigError) -> str:
    if not _is_setting(error.setting):
        return ""
    if error.setting == "train.steps":  # its default is a length given otherwise
        return "train.steps=1000"
    section, key = error.setting.split(".")
    default = getattr(getattr(Config(), section), key)
    return "" if default == error.value else f"{error.setting}={_as_yaml(default)}"


def _is_setting(name: str) -> bool:
    section, _, key = name.partition(".")
    return section != "model" and hasattr(getattr(Config(), section, None), key) if key else False


def _fits(name: str, text: str) -> bool:
    """Whether a word of the way out is one of the setting's choices."""
    if not _is_setting(name):
        return False
    section, key = name.split(".")
    hint = typing.get_type_hints(type(getattr(Config(), section)))[key]
    return text in map(str, typing.get_args(hint))


def _as_yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True)
        .strip()
        .removesuffix("...")
        .strip()
        .replace(", ", ",")
    )


# -- many errors at once -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Issue:
    """Something that is wrong, and the line that mends it."""

    text: str
    paste: str
    error: UserError


class IssueCollector:
    """All that is found wrong, instead of the first."""

    def __init__(self) -> None:
        self.errors: list[Issue] = []
        self.warnings: list[str] = []
        self._settings: set[str] = set()

    def add(self, error: UserError, *, paste: str = "") -> None:
        """Each once: what several rules refuse is one mistake."""
        if isinstance(error, ConfigError):
            self._settings.add(error.setting)
        finding = Issue(str(error), paste or fix_for(error), error)
        if finding.text not in [other.text for other in self.errors]:
            self.errors.append(finding)

    def raise_first(self) -> None:
        """Raises the first error, if there is one."""
        for issue in self.errors:
            raise issue.error

    def follows(self, error: ConfigError) -> bool:
        """Whether settings are missed of which one is there and could not be read."""
        return "missing" in error.requirement and any(
            name in self._settings for name in re.split(", | and ", error.setting)
        )

    def attempt(self, rule: Callable[[], Any], *, paste: str = "") -> Any:
        """What the rule returns; None where it refuses, which is kept."""
        try:
            return rule()
        except UserError as error:
            self.add(error, paste=paste)
            return None

    def passes(self, rule: Callable[[], Any]) -> bool:
        """Whether the rule has nothing to refuse."""
        try:
            rule()
        except UserError as error:
            self.add(error)
            return False
        return True
