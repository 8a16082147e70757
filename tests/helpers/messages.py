"""Errors as the command line prints them."""

from __future__ import annotations


def split_error(stderr: str) -> tuple[str, str]:
    """Returns the message and the fix of the only error in `stderr`; the fix may be empty.

    Raises AssertionError if there is other text.
    """
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    message, *fix = stderr.removeprefix("error: ").splitlines()
    assert len(fix) <= 1, stderr
    assert all(line.startswith("  fix: ") for line in fix), stderr
    return message, "".join(fix).removeprefix("  fix: ")
