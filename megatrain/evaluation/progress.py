"""How far an evaluation is: a line on the console every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from megatrain.evaluation.windows import Row
from megatrain.telemetry.console import short_number

logger = logging.getLogger("megatrain")

_SECONDS = 5.0


class ProgressBar:
    """Counts what goes to the model; silent where told so."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.rows = self.tokens = 0
        self.started = self._shown = time.monotonic()

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on."""
        for row in rows:
            yield row
            self.rows += 1
            self.tokens += len(row.tokens)
            now = time.monotonic()
            if not self.silent and now - self._shown >= _SECONDS:
                self._shown = now
                logger.info(
                    f"  {self.rows:,} rows, {short_number(self.tokens)} tokens, {self.rate()}"
                )

    def rate(self) -> str:
        """Tokens a second since the start."""
        return f"{short_number(self.tokens / max(self.seconds, 1e-9))} tok/s"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
