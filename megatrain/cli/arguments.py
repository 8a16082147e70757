"""Argument types and output files that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatrain.errors import UserError


def positive_int(text: str) -> int:
    """Returns an integer of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def write_text(path: Path | str, text: str) -> None:
    """Writes a file; raises UserError if that fails."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
