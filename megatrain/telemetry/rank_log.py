"""Where a rank's words go: the console for the reader of the run, a log file a rank for everything else.

deepspeed, torch and the libraries below them print to file descriptors 1 and 2, some from C++. Those are pointed at
`logs/rank-NNNNN.log` in the run's folder, and the console is kept apart for the one logger, which speaks there on
rank 0 only. What the logger says stands in the log file too, and once more for programs in `logs/rank-NNNNN.jsonl`, with the
rank's own figures:

    {"time": "2026-11-24T23:31:02.412+00:00", "level": "INFO", "rank": 3, "host": "node7", "step": 20, "message": "figures", "forward": 0.41, ...}
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megatrain.config.loader import Config
from megatrain.distributed.env import RankEnv
from megatrain.errors import ConfigError
from megatrain.files import LineFile

# Begins the line that a run appends to its logs first.
START_OF_RUN = "=== "


class LogStreams(NamedTuple):
    """The console as the rank found it, its log file, and its log for programs."""

    out: TextIO
    err: TextIO
    log: TextIO
    lines: RankJsonLog


def log_path(config: Config, rank: int) -> Path:
    return Path(config.run.output_dir) / "logs" / f"rank-{rank:05d}.log"


@contextlib.contextmanager
def rank_streams(config: Config, place: RankEnv) -> Iterator[LogStreams]:
    """Send file descriptors 1 and 2 to the rank's log (not with run.verbose) and set up the logger, until the end."""
    log, lines = _open_logs(config, place)
    with (
        log,
        os.fdopen(os.dup(1), "w", buffering=1) as out,
        os.fdopen(os.dup(2), "w", buffering=1) as err,
    ):
        streams = LogStreams(out, err, log, lines)
        if not config.run.verbose:
            _point_at(log.fileno(), log.fileno())
        faulthandler.enable(file=log)
        try:
            with _logger(streams, place):
                yield streams
        finally:
            faulthandler.disable()
            _point_at(out.fileno(), err.fileno())


def _open_logs(config: Config, place: RankEnv) -> tuple[TextIO, RankJsonLog]:
    path = log_path(config, place.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = _LogFile(path.open("ab"), encoding="utf-8", line_buffering=True)
        lines = RankJsonLog(path.with_suffix(".jsonl"), place.rank)
    except OSError as error:
        raise ConfigError(
            "run.output_dir", config.run.output_dir, f"cannot be written ({error})"
        ) from None
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    host, process = socket.gethostname(), os.getpid()
    print(
        f"{START_OF_RUN}{now} rank {place.rank} of {place.world_size} on {host}, process {process}",
        file=log,
    )
    lines.write("INFO", "start", world_size=place.world_size, process=process)
    return log, lines


class _LogFile(io.TextIOWrapper):
    """What a full disk does not take is given up: a run, and the sentence that says why it ends, are worth more than its log."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _point_at(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


@contextlib.contextmanager
def _logger(streams: LogStreams, place: RankEnv) -> Iterator[None]:
    to_log = logging.StreamHandler(streams.log)
    to_log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [to_log, streams.lines]
    if place.rank == 0:
        to_console = logging.StreamHandler(streams.out)
        to_console.setFormatter(_ConsoleFormatter())
        handlers.append(to_console)
    logger = logging.getLogger("megatrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = list(handlers)
    try:
        yield
    finally:
        logger.handlers = []
        streams.lines.close()


class RankJsonLog(logging.Handler):
    """The logger's records as JSON lines, each with the step that the rank is at."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self.rank, self.host, self.step = rank, socket.gethostname(), 0
        self._file: LineFile | None = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.levelname, record.getMessage())

    def write(self, level: str, message: str, **fields: Any) -> None:
        """A line that is not for people; a full disk costs the line and not the run."""
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        about = {
            "time": now,
            "level": level,
            "rank": self.rank,
            "host": self.host,
            "step": self.step,
            "message": message,
        }
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write({**about, **fields})

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None


def rank_json_log() -> RankJsonLog | None:
    """The structured log of this process, where it is a rank that has one."""
    return next(
        (
            handler
            for handler in logging.getLogger("megatrain").handlers
            if isinstance(handler, RankJsonLog)
        ),
        None,
    )


class _ConsoleFormatter(logging.Formatter):
    """The bare message; a word in front when it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
