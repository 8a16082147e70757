"""Progress bars: `tqdm` on a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 10.0
"""Shortest time between two updates. Work that is done earlier shows no bar."""


def progress_bar(
    total: float | None, *, unit: str, description: str, stream: TextIO | None
) -> tqdm:
    """Returns a tqdm bar that counts `unit`s with SI prefixes, such as `12.3MB` for the unit "B".

    Use it in a `with` block and call `update(count)`. `set_postfix_str(text, refresh=False)`
    adds a text behind the rate.

    Args:
        total: the number of units at the end, None if unknown.
        unit: a unit that is written directly behind numbers, such as "B" or " rows".
        description: the text in front of the numbers.
        stream: the output, usually `sys.stderr`. None shows nothing.
    """
    from tqdm import tqdm  # imported late to keep the start of commands short

    is_terminal = stream is not None and stream.isatty()
    seconds = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        desc=description,
        file=stream if is_terminal or stream is None else _LogLines(stream),
        disable=stream is None,
        dynamic_ncols=is_terminal,
        smoothing=0,  # the rate since the start
        miniters=1,
        mininterval=seconds,
        delay=seconds,
    )


class _LogLines:
    """Writes each update of a bar as a line, where tqdm returns to the start of the same line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
