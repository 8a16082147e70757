"""Collects all errors of a run instead of raising the first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatrain.errors import ConfigError, UserError, with_fix

_LENGTHS = frozenset(["train.steps", "train.tokens", "train.epochs"])


@dataclasses.dataclass(frozen=True)
class Issue:
    """An error with its message and the fix as the user types it, empty if there is none."""

    message: str
    fix: str
    error: UserError

    def __str__(self) -> str:
        return with_fix(self.message, self.fix)


class IssueCollector:
    """All errors and warnings found so far, each once."""

    def __init__(self) -> None:
        self.errors: list[Issue] = []
        self.warnings: list[str] = []

    def add(self, error: UserError, *, fix: str = "") -> None:
        """Adds an error. `fix` replaces the fix of the error."""
        if str(error) not in [issue.message for issue in self.errors]:
            self.errors.append(Issue(str(error), fix or error.fix_text, error))

    def raise_first(self) -> None:
        """Raises the first error, if there is one."""
        for issue in self.errors:
            raise issue.error

    def is_consequence(self, error: ConfigError) -> bool:
        """Returns whether a run has no length only because its setting could not be read."""
        found = [issue.error for issue in self.errors]
        return (error.setting in _LENGTHS and error.value is None) and any(
            isinstance(other, ConfigError) and other.setting in _LENGTHS for other in found
        )

    def attempt(self, rule: Callable[[], Any], *, fix: str = "") -> Any:
        """Returns the result of `rule`, or None after adding its error."""
        try:
            return rule()
        except UserError as error:
            self.add(error, fix=fix)
            return None

    def passes(self, rule: Callable[[], Any]) -> bool:
        """Returns whether `rule` raises no error, after adding its error."""
        try:
            rule()
        except UserError as error:
            self.add(error)
            return False
        return True
