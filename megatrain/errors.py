"""User-facing exceptions.

The command line prints them without a traceback and exits with 1. Any other exception is a bug in
megatrain and propagates with its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fix = Mapping[str, Any]
"""Values by setting, such as `{"train.dtype": "bf16"}`, that remove an error when they are set."""


class UserError(Exception):
    """An error in the user's settings, files or environment.

    Args:
        message: setting or file, its value and the requirement that it does not meet.
        fix: the settings that remove the error.
        command: a shell command that removes the error, where no setting does.
    """

    def __init__(self, message: str, *, fix: Fix | None = None, command: str = "") -> None:
        super().__init__(message)
        self.fix: dict[str, Any] = dict(fix or {})
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the fields instead of the arguments, which subclasses change."""
        return _unpickle, (type(self), self.args, self.__dict__)

    @property
    def fix_text(self) -> str:
        """The fix as the user types it: overrides `section.key=value`, or a command."""
        return " ".join(format_override(name, value) for name, value in self.fix.items()) or (
            self.command
        )

    @property
    def description(self) -> str:
        """The message and, on a line of its own, the fix."""
        return with_fix(str(self), self.fix_text)


def _unpickle(cls: type[UserError], args: tuple[Any, ...], fields: dict[str, Any]) -> UserError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(UserError):
    """A setting whose value does not meet a requirement.

    Args:
        setting: the name as the user writes it, such as `train.dtype`.
        value: its value.
        requirement: the requirement, such as "must be at least 1".
        hint: advice; the fix itself belongs into `fix`.
        fix: the settings that remove the error.
        command: a shell command that removes the error, where no setting does.
    """

    def __init__(
        self,
        setting: str,
        value: object,
        requirement: str,
        hint: str = "",
        *,
        fix: Fix | None = None,
        command: str = "",
    ) -> None:
        self.setting = setting
        self.value = value
        self.requirement = requirement
        self.hint = hint
        message = f"{setting}={format_value(value)} {requirement}"
        super().__init__(f"{message}; {hint}" if hint else message, fix=fix, command=command)


class DataError(UserError):
    """A data file that is missing, damaged or in the wrong format."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written."""


class RankError(UserError):
    """A failure of ranks, whose cause was printed.

    Args:
        exit_code: the exit code of the run.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a rank failed with exit code {exit_code}; the cause was printed above")
        self.exit_code = exit_code


def with_fix(message: str, fix: str) -> str:
    """Returns an error message followed by the line of its fix, if there is one."""
    return f"{message}\n  fix: {fix}" if fix else message


def format_value(value: object) -> str:
    """Returns a setting's value as YAML writes it: null, true and false."""
    yaml_names = {None: "null", True: "true", False: "false"}
    return yaml_names[value] if value is None or isinstance(value, bool) else str(value)


def truncate(value: object) -> str:
    """Returns `format_value`, cut to 60 characters."""
    text = format_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def format_override(name: str, value: object) -> str:
    """Returns `name=value` as an override of the command line that reads back as `value`."""
    import yaml  # not needed to print --help

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{name}={text.removesuffix('...' + chr(10)).strip().replace(', ', ',')}"
