"""How a run fails: what a rank says of it, which of many failures is the cause, and what the user reads.

One rank that fails makes its neighbours fail too, with broken connections. So whoever watches looks at all that has happened
and shows the earliest that is a cause, not a consequence.
"""

from __future__ import annotations

import errno
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatrain.distributed.errors import is_lost_connection
from megatrain.errors import UserError
from megatrain.telemetry.rank_log import START_OF_RUN

_LOG_TAIL_LINES = 20

SECONDS_FOR_CAUSES = 2.0
"""How long a broken connection waits for the report of what broke it."""


class FailureReport(NamedTuple):
    """What a failing rank tells whoever watches it.

    `user` is a sentence for the user, `error` a traceback, `lost` the traceback of a connection that broke because another
    rank failed first, `stall` a watchdog's sentence on a run that stands still.
    """

    rank: int
    kind: Literal["user", "error", "lost", "stall"]
    text: str
    time: float


Reporter = Callable[[FailureReport], Any]


class RankExit(NamedTuple):
    """A rank that ended without finishing and without a report. `code` is its exit code where it is known, `who` where it ran."""

    rank: int
    code: int | None
    time: float
    who: str = ""


def describe_error(error: Exception, rank: int) -> FailureReport:
    if isinstance(error, UserError):
        return FailureReport(rank, "user", str(error), time.time())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" to {error.filename}" if error.filename else ""
        return FailureReport(
            rank,
            "user",
            f"rank {rank} cannot write{where} ({error.strerror}); checkpoints are as they were: make room, and start the "
            "same command to go on",
            time.time(),
        )
    text = "".join(traceback.format_exception(error))
    return FailureReport(rank, "lost" if is_lost_connection(error) else "error", text, time.time())


def find_cause(failures: Iterable[FailureReport | RankExit]) -> FailureReport | RankExit | None:
    """The earliest failure that is not the consequence of another."""
    causes = [
        failure for failure in failures if isinstance(failure, RankExit) or failure.kind != "lost"
    ]
    return min(causes, key=lambda cause: cause.time, default=None)


def format_sentence(failure: FailureReport | RankExit) -> str:
    """The failure in one line."""
    if isinstance(failure, RankExit):
        return f"rank {failure.rank} {_ending(failure)}"
    last = failure.text.strip().splitlines()[-1] if failure.text.strip() else ""
    return (
        failure.text.splitlines()[0]
        if failure.kind in ("user", "stall")
        else f"rank {failure.rank} failed: {last}"
    )


def format_failure(failure: FailureReport | RankExit, log: Path) -> str:
    """What the user reads; `log` is the failed rank's."""
    if isinstance(failure, RankExit):
        tail = "".join(f"\n  {line}" for line in _last_lines(log))
        return f"{format_sentence(failure)}; the last lines of its log, {log}:{tail}"
    if failure.kind in ("user", "stall"):
        return f"error: {failure.text}"
    return f"rank {failure.rank} failed:\n{failure.text}its log: {log}"


def _ending(death: RankExit) -> str:
    where = f"({death.who}) " if death.who else ""
    if death.code is None:
        return f"{where}ended without a word (often: killed, as it was out of memory)"
    if death.code >= 0:
        return f"{where}ended with exit code {death.code}"
    name = signal.Signals(-death.code).name
    hint = " (often: out of memory)" if -death.code == signal.SIGKILL else ""
    return f"{where}was killed by {name}{hint}"


def _last_lines(log: Path) -> list[str]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    start = max((i for i, line in enumerate(lines) if line.startswith(START_OF_RUN)), default=0)
    return lines[start:][-_LOG_TAIL_LINES:]
