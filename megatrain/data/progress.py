"""How far preprocessing is: one line that is rewritten on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 10.0


class ProgressBar:
    """Write MB/s and tokens/s to a stream; to nowhere when it is None."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()
        self._period = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._started = self._shown = time.monotonic()
        self._open_line = False

    def show(self, *, num_bytes: int, num_tokens: int) -> None:
        """Say how many bytes of text became how many tokens, when it is time to."""
        now = time.monotonic()
        if self._stream is None or now - self._shown < self._period:
            return
        self._shown = now
        seconds = now - self._started
        text = (
            f"{num_bytes / 1e6:,.0f} MB of text, {num_tokens / 1e6:,.1f} M tokens, "
            f"{num_bytes / 1e6 / seconds:.1f} MB/s, {num_tokens / seconds:,.0f} tokens/s"
        )
        self._stream.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._open_line = self._terminal

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open_line and self._stream is not None:
            self._stream.write("\n")
