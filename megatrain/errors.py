"""The errors that speak to the person who started the run.

Each is one clear sentence; the command line prints it without a traceback and exits with 1. Anything else that is
raised is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user wrote, or gave us, that cannot work."""


def format_value(value: object) -> str:
    """A setting's value as YAML has it, where Python has another word for it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def truncate(value: object) -> str:
    """The same, of a value that may be long."""
    text = format_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


class ConfigError(UserError):
    """A setting that cannot work: which one, its value, the rule it breaks and the way out.

    `paste`: words `section.key=value` that mend it, where the way out does not name them (mend.py finds those that it does).
    """

    def __init__(
        self, setting: str, value: object, rule: str, way_out: str = "", *, paste: str = ""
    ) -> None:
        self.setting, self.value, self.rule, self.way_out, self.paste = (
            setting,
            value,
            rule,
            way_out,
            paste,
        )
        super().__init__(
            f"{setting}={format_value(value)} {rule}" + (f"; {way_out}" if way_out else "")
        )


class DataError(UserError):
    """A data file that is missing, damaged or does not hold what it should."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model, or that cannot be written."""
