"""How far a conversion is: one line that is rewritten on a terminal, a line every ten seconds elsewhere, and the rate at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 10.0


class ProgressBar:
    """Counts bytes of `total`."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say, self.done = total, say, 0
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """So many more bytes were written."""
        self.done += count
        now = time.monotonic()
        if now - self._shown < (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._shown = now
        if self._terminal:
            sys.stderr.write(f"\r{self._line(now)}\x1b[K")
            sys.stderr.flush()
        else:
            self.say(self._line(now))

    def _line(self, now: float) -> str:
        rate = self.done / 1e6 / max(now - self._started, 1e-9)
        share = self.done / self.total if self.total else 1.0
        return f"  wrote   {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB ({share:.0%}), {rate:,.0f} MB/s"

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
        if kind is None:
            self.say(self._line(time.monotonic()))
