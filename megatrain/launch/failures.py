"""Failures of ranks: their reports, the cause among several of them, and the text for the user.

A rank that fails breaks the connections of its neighbours, which then fail too. The cause is the
earliest failure that is not a broken connection.
"""

from __future__ import annotations

import errno
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatrain.checkpoint import manifest, retention
from megatrain.config.loader import Config
from megatrain.distributed.errors import is_lost_connection
from megatrain.errors import UserError
from megatrain.telemetry.rank_log import START_OF_RUN

_LOG_TAIL_LINES = 20

SECONDS_FOR_CAUSES = 2.0
"""Time to wait for the report of the cause after a broken connection was reported."""


class FailureReport(NamedTuple):
    """The report of a failing rank.

    Its kinds:

    - "user": an error in settings, files or environment.
    - "error": a traceback.
    - "lost": the traceback of a connection that another rank's failure broke.
    - "stall": a hang that a watchdog detected.
    """

    rank: int
    kind: Literal["user", "error", "lost", "stall"]
    text: str
    time: float


Reporter = Callable[[FailureReport], Any]


class RankExit(NamedTuple):
    """A rank that exited with an error and without a report.

    `code` is its exit code if known, `process` its host and process id if known.
    """

    rank: int
    code: int | None
    time: float
    process: str = ""


Failure = FailureReport | RankExit


def report_of(error: Exception, rank: int) -> FailureReport:
    """Returns the report of an exception on `rank`."""
    if isinstance(error, UserError):
        return FailureReport(rank, "user", error.description, time.time())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        target = f" to {error.filename}" if error.filename else ""
        text = (
            f"rank {rank} cannot write{target} ({error.strerror}); existing checkpoints are "
            "intact: free disk space, then re-run the same command to resume"
        )
        return FailureReport(rank, "user", text, time.time())
    text = "".join(traceback.format_exception(error))
    return FailureReport(rank, "lost" if is_lost_connection(error) else "error", text, time.time())


def is_user_error(failure: Failure) -> bool:
    """Returns True if the failure is an error in the user's settings, files or environment."""
    return isinstance(failure, FailureReport) and failure.kind == "user"


def find_cause(failures: Iterable[Failure]) -> Failure | None:
    """Returns the earliest failure that is not a broken connection, if there is one."""
    causes = [
        failure for failure in failures if isinstance(failure, RankExit) or failure.kind != "lost"
    ]
    return min(causes, key=lambda cause: cause.time, default=None)


def summarize(failure: Failure) -> str:
    """Returns the failure in one line."""
    if isinstance(failure, RankExit):
        return f"rank {failure.rank} {_describe_exit(failure)}"
    if failure.kind in ("user", "stall"):
        return failure.text.splitlines()[0]
    lines = failure.text.strip().splitlines()
    return f"rank {failure.rank} failed: {lines[-1] if lines else ''}"


def format_failure(failure: Failure, log: Path) -> str:
    """Returns the text for the user; `log` is the log file of the failed rank."""
    if isinstance(failure, RankExit):
        tail = "".join(f"\n  {line}" for line in _last_lines(log))
        return f"{summarize(failure)}; the last lines of its log, {log}:{tail}"
    if failure.kind in ("user", "stall"):
        return f"error: {failure.text}"
    return f"rank {failure.rank} failed:\n{failure.text}log: {log}"


def _describe_exit(exited: RankExit) -> str:
    process = f"({exited.process}) " if exited.process else ""
    if exited.code is None:
        return f"{process}exited without reporting an error (often: killed, out of memory)"
    if exited.code < 0:
        name = signal.Signals(-exited.code).name
        cause = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"{process}was killed by signal {name}{cause}"
    return f"{process}exited with code {exited.code}"


def _last_lines(log: Path) -> list[str]:
    """Returns the last log lines of the current start of the run."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    start = max((i for i, line in enumerate(lines) if line.startswith(START_OF_RUN)), default=0)
    return lines[start:][-_LOG_TAIL_LINES:]


def recovery_hint(config: Config, failure: Failure, *, step: int | None) -> str:
    """Returns how the user can resume the run, or which steps are lost.

    Empty if nothing was trained, or if the failure itself contains the advice.

    Args:
        step: the step in which the run failed; 0 or None before the first.
    """
    resume = config.checkpoint.resume
    if config.train.steps == 0 or is_user_error(failure):
        return ""
    saved = _newest_step(Path(config.run.output_dir) / "checkpoints")
    if resume == "auto" and saved is not None:
        return f"re-run the same command to resume from step {saved}"
    start = "start from scratch" if resume in ("auto", "never") else f"start again from {resume}"
    if saved is not None:
        return (
            f"re-run the same command to {start} (checkpoint.resume={resume}); with "
            f"checkpoint.resume=auto it resumes from step {saved}"
        )
    if not step or step == 1:
        return f"no step was completed; re-run the same command to {start}"
    every = config.checkpoint.save_every
    setting = f"checkpoint.save_every={every}" + ("" if every else " saves only at the end")
    return (
        f"there is no complete checkpoint ({setting}); the completed steps are lost; "
        f"re-run the same command to {start}"
    )


def _newest_step(folder: Path) -> int | None:
    """Returns the step of the checkpoint that `checkpoint.resume=auto` takes, by file sizes."""
    try:
        path, _ = manifest.find_newest(folder)
        return None if path is None else retention.step_number(path)
    except (OSError, ValueError):
        return None
