"""The supervisor of the ranks of one machine: forwards signals, finds the cause of a failure, ends
the other ranks, and decides on restarts.

Restarts are a loop of the supervisor. torch's elastic agent would be a second supervisor inside it:
here ranks are forked from a process that has imported everything, and the user reads one cause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from megatrain.checkpoint import manifest, retention
from megatrain.config.loader import Config
from megatrain.launch.failures import (
    SECONDS_FOR_CAUSES,
    Failure,
    FailureReport,
    RankExit,
    find_cause,
    format_failure,
    is_user_error,
    recovery_hint,
    summarize,
)
from megatrain.launch.worker import INTERRUPTED
from megatrain.telemetry.events import EventLog, EventName, write_failure
from megatrain.telemetry.rank_log import log_path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_STOP_TIMEOUT = 10.0
"""Time that signalled ranks may take after the first of them exited without finishing."""


class RankProcess(NamedTuple):
    """A started rank: its process, the pipe of its reports, and the shared `value` of its step."""

    rank: int
    process: BaseProcess
    reports: Connection
    step: Any


class RunOutcome(NamedTuple):
    """The end of a run: exit code, failure (None if none, or if it was stopped) and its step."""

    code: int
    failure: Failure | None = None
    step: int = 0

    @property
    def last_completed_step(self) -> int | None:
        """The step before the failed one; None if the failure was before the first step."""
        return self.step - 1 if self.step else None


class Supervisor:
    """The ranks of one machine, from their start until all have exited."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ranks: list[RankProcess] = []
        self.reports: list[FailureReport] = []
        self.exits: list[RankExit] = []
        self.ended: set[int] = set()
        self.closed_pipes: set[int] = set()
        self.stop_signal: int | None = None

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forwards SIGINT and SIGTERM to every rank once, and kills the ranks at the second.

        No rank outlives the block.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def watch(self) -> RunOutcome:
        """Waits until all ranks have exited, or ends them after a failure and reports the cause."""
        while len(self.ended) < len(self.ranks) and not self._has_failed():
            self._poll(timeout=None)
        if not self._has_failed():
            return RunOutcome(0)
        self._wait_for_cause()
        self._kill()
        return self._report()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_second = self.stop_signal is not None
        self.stop_signal = number
        for rank in self.ranks:
            if rank.rank not in self.ended and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, signal.SIGKILL if is_second else number)

    def _has_failed(self) -> bool:
        return bool(self.reports or self.exits)

    def _poll(self, *, timeout: float | None) -> None:
        """Handles reports and exits of ranks; waits up to `timeout` seconds for the first."""
        pipes = [rank.reports for rank in self.ranks if rank.rank not in self.closed_pipes]
        sentinels = [rank.process.sentinel for rank in self.ranks if rank.rank not in self.ended]
        ready = wait([*pipes, *sentinels], timeout)
        for rank in self.ranks:
            if rank.reports in ready:
                self._read_report(rank)
        for rank in self.ranks:
            if rank.process.sentinel in ready:
                self._on_exit(rank)

    def _read_report(self, rank: RankProcess) -> None:
        try:
            self.reports.append(rank.reports.recv())
        except EOFError:
            self.closed_pipes.add(rank.rank)

    def _on_exit(self, rank: RankProcess) -> None:
        rank.process.join()
        self.ended.add(rank.rank)
        while rank.rank not in self.closed_pipes and rank.reports.poll():
            self._read_report(rank)
        code = rank.process.exitcode
        if code and all(report.rank != rank.rank for report in self.reports):
            self.exits.append(RankExit(rank.rank, code, time.time()))

    def _wait_for_cause(self) -> None:
        seconds = SECONDS_FOR_CAUSES if self.stop_signal is None else _STOP_TIMEOUT
        deadline = time.monotonic() + seconds
        while (
            len(self.ended) < len(self.ranks)
            and self._cause() is None
            and time.monotonic() < deadline
        ):
            self._poll(timeout=deadline - time.monotonic())

    def _cause(self) -> Failure | None:
        """Returns the earliest failure that neither another one nor a forwarded signal caused."""
        return find_cause([*self.reports, *(self.exits if self.stop_signal is None else [])])

    def _kill(self) -> None:
        """Kills the running ranks, with the processes that they started."""
        for rank in self.ranks:
            if rank.rank not in self.ended and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.kill()
        for rank in self.ranks:
            rank.process.join()

    def _report(self) -> RunOutcome:
        cause = self._cause()
        if cause is None and self.stop_signal is not None:
            return RunOutcome(128 + self.stop_signal)
        failure = cause or min(self.reports, key=lambda report: report.time)
        if isinstance(failure, RankExit) and failure.code == INTERRUPTED:
            return RunOutcome(INTERRUPTED)
        _print_error(format_failure(failure, log_path(self.config.run.output_dir, failure.rank)))
        return RunOutcome(1, failure, max(rank.step.value for rank in self.ranks))


class RestartPolicy:
    """Decides on restarts (`run.max_restarts`), from before the first start on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = Path(config.run.output_dir)
        self._count = 0
        self._started_at = datetime.now().astimezone()
        self._failed_steps: set[int] = set()
        self._earlier = self._checkpoints() if config.run.max_restarts else set()

    def should_restart(self, outcome: RunOutcome) -> bool:
        """Returns True if the ranks are to be started again; prints the reason or the advice."""
        assert outcome.failure is not None
        restart = self._decide(outcome, outcome.failure)
        if not restart and (
            hint := recovery_hint(self._config, outcome.failure, step=outcome.step)
        ):
            _print_error(hint)
        return restart

    def config(self) -> Config:
        """Returns the config of the next start.

        It resumes from the newest complete checkpoint that this run wrote, if there is one.
        """
        checkpoint = self._config.checkpoint
        if checkpoint.resume == "auto":
            return self._config
        written = [
            path
            for path, *_ in sorted(self._checkpoints() - self._earlier, reverse=True)
            if manifest.find_problem(path) is None
        ]
        if not written:
            return self._config
        return dataclasses.replace(
            self._config, checkpoint=dataclasses.replace(checkpoint, resume=str(written[0]))
        )

    def _decide(self, outcome: RunOutcome, failure: Failure) -> bool:
        allowed = self._config.run.max_restarts
        if not allowed or is_user_error(failure):
            write_failure(
                self._folder,
                summarize(failure),
                step=outcome.last_completed_step,
                since=self._started_at,
                is_user_error=is_user_error(failure),
            )
            return False
        location = f"step {outcome.step}" if outcome.step else "the start"
        if reason := self._reason_to_stop(outcome, location):
            self._write_event("fail", outcome, reason=reason)
            _print_error(f"not restarted: {reason} (run.max_restarts={allowed})")
            return False
        self._failed_steps.add(outcome.step)
        self._count += 1
        self._started_at = datetime.now().astimezone()
        self._write_event("restart", outcome, restart=self._count, of=allowed)
        _print_error(
            f"restart {self._count} of {allowed} (run.max_restarts) after a failure in {location}"
        )
        return True

    def _reason_to_stop(self, outcome: RunOutcome, location: str) -> str:
        if outcome.step in self._failed_steps:
            return f"{location} failed twice"
        allowed = self._config.run.max_restarts
        return "" if self._count < allowed else f"it was restarted {allowed} times"

    def _checkpoints(self) -> set[tuple[Path, int, int]]:
        """Returns the run's checkpoints with inode and time, which differ after a replacement."""
        folders = [
            (path, path.stat()) for path in retention.list_checkpoints(self._folder / "checkpoints")
        ]
        return {(path, stat.st_ino, stat.st_mtime_ns) for path, stat in folders}

    def _write_event(self, event: EventName, outcome: RunOutcome, **fields: object) -> None:
        assert outcome.failure is not None
        with EventLog(self._folder) as events:
            events.write(
                event,
                step=outcome.last_completed_step,
                cause=summarize(outcome.failure),
                **fields,
            )


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
