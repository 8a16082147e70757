"""Watch the ranks of one machine: pass signals on, find the first cause of a failure, end the others.

What of several failures is the cause, and how it is said, is in failure.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple

from megatrain.config.loader import Config
from megatrain.launch.failures import (
    SECONDS_FOR_CAUSES,
    FailureReport,
    RankExit,
    find_cause,
    format_failure,
)
from megatrain.launch.worker import INTERRUPTED
from megatrain.telemetry.rank_log import log_path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# How long ranks that were asked to stop may take once the first of them has ended without finishing.
_SECONDS_TO_STOP = 10.0


class RankProcess(NamedTuple):
    """A started rank: its process, the end of the pipe on which it reports, and the `value` of the step that it is in."""

    rank: int
    process: BaseProcess
    reports: Connection
    step: Any


class RunOutcome(NamedTuple):
    """How a run ended: its exit code; what failed, None where nothing did or it was asked to stop; and in which step."""

    code: int
    failure: FailureReport | RankExit | None = None
    step: int = 0


class Supervisor:
    """The ranks of one machine, from their start until all have ended."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ranks: list[RankProcess] = []
        self.reports: list[FailureReport] = []
        self.deaths: list[RankExit] = []
        self.ended: set[int] = set()
        self.silent: set[int] = set()
        self.stop_signal: int | None = None

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Within it SIGINT and SIGTERM go to every rank once and a second one kills them; no rank outlives it."""
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self) -> RunOutcome:
        """Wait until all ranks have ended, or end them when one has failed, and say why."""
        while len(self.ended) < len(self.ranks) and not self._failed():
            self._look(timeout=None)
        if not self._failed():
            return RunOutcome(0)
        self._wait_for_causes()
        self._kill()
        return self._explain()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.stop_signal is not None
        self.stop_signal = number
        for rank in self.ranks:
            if rank.rank not in self.ended and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, signal.SIGKILL if again else number)

    def _failed(self) -> bool:
        return bool(self.reports or self.deaths)

    def _look(self, *, timeout: float | None) -> None:
        """Take in what has happened to the ranks, waiting up to `timeout` seconds for something to happen."""
        open_pipes = [rank.reports for rank in self.ranks if rank.rank not in self.silent]
        sentinels = [rank.process.sentinel for rank in self.ranks if rank.rank not in self.ended]
        ready = wait([*open_pipes, *sentinels], timeout)
        for rank in self.ranks:
            if rank.reports in ready:
                self._read(rank)
        for rank in self.ranks:
            if rank.process.sentinel in ready:
                self._bury(rank)

    def _read(self, rank: RankProcess) -> None:
        try:
            self.reports.append(rank.reports.recv())
        except EOFError:
            self.silent.add(rank.rank)

    def _bury(self, rank: RankProcess) -> None:
        rank.process.join()
        self.ended.add(rank.rank)
        while rank.rank not in self.silent and rank.reports.poll():
            self._read(rank)
        code = rank.process.exitcode
        if code and all(report.rank != rank.rank for report in self.reports):
            self.deaths.append(RankExit(rank.rank, code, time.time()))

    def _wait_for_causes(self) -> None:
        seconds = SECONDS_FOR_CAUSES if self.stop_signal is None else _SECONDS_TO_STOP
        until = time.monotonic() + seconds
        while (
            len(self.ended) < len(self.ranks) and self._cause() is None and time.monotonic() < until
        ):
            self._look(timeout=until - time.monotonic())

    def _cause(self) -> FailureReport | RankExit | None:
        """The earliest failure that is not the consequence of another, or of a signal that was passed on."""
        return find_cause([*self.reports, *(self.deaths if self.stop_signal is None else [])])

    def _kill(self) -> None:
        """End the ranks that still run, with the processes they have started."""
        for rank in self.ranks:
            if rank.rank not in self.ended and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.kill()
        for rank in self.ranks:
            rank.process.join()

    def _explain(self) -> RunOutcome:
        cause = self._cause()
        if cause is None and self.stop_signal is not None:
            return RunOutcome(128 + self.stop_signal)
        failure = cause or min(self.reports, key=lambda report: report.time)
        if isinstance(failure, RankExit) and failure.code == INTERRUPTED:
            return RunOutcome(INTERRUPTED)
        print(
            format_failure(failure, log_path(self.config, failure.rank)),
            file=sys.stderr,
            flush=True,
        )
        return RunOutcome(1, failure, max(rank.step.value for rank in self.ranks))
