"""Console and log files of a rank.

deepspeed, torch and their libraries print to file descriptors 1 and 2, some of them from C++. These
are redirected to `logs/rank-NNNNN.log` in the run folder. The console is kept for the logger of
rank 0. Log records also go to the log file, and as JSON to `logs/rank-NNNNN.jsonl`, together with
the rank's own metrics:

    {"time": "2026-11-24T23:31:02.412+00:00", "level": "INFO", "rank": 3, "host": "node7", "step":
    20,
     "message": "figures", "forward": 0.41, ...}
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

from megatrain.distributed.env import RankEnv
from megatrain.errors import ConfigError
from megatrain.files import LineFile

START_OF_RUN = "=== "
"""Start of the line with which each start of a run begins in its logs."""


class LogStreams(NamedTuple):
    """The original console, the log file and the JSON log of a rank."""

    out: TextIO
    err: TextIO
    log: TextIO
    lines: RankJsonLog


def log_path(output_dir: Path | str, rank: int) -> Path:
    """Returns the path of a rank's log file."""
    return Path(output_dir) / "logs" / f"rank-{rank:05d}.log"


@contextlib.contextmanager
def rank_streams(output_dir: str, env: RankEnv, *, verbose: bool) -> Iterator[LogStreams]:
    """Redirects file descriptors 1 and 2 to the rank's log and sets up the logger for a block.

    Args:
        output_dir: the run folder (`run.output_dir`).
        env: this rank.
        verbose: True leaves file descriptors 1 and 2 at the console (`run.verbose`).

    Raises:
        ConfigError: if the logs cannot be written.
    """
    log, lines = _open_logs(output_dir, env)
    with (
        log,
        os.fdopen(os.dup(1), "w", buffering=1) as out,
        os.fdopen(os.dup(2), "w", buffering=1) as err,
    ):
        streams = LogStreams(out, err, log, lines)
        if not verbose:
            _redirect(log.fileno(), log.fileno())
        faulthandler.enable(file=log)
        try:
            with _logger(streams, env):
                yield streams
        finally:
            faulthandler.disable()
            _redirect(out.fileno(), err.fileno())


def _open_logs(output_dir: str, env: RankEnv) -> tuple[TextIO, RankJsonLog]:
    path = log_path(output_dir, env.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = _LogFile(path.open("ab"), encoding="utf-8", line_buffering=True)
        lines = RankJsonLog(path.with_suffix(".jsonl"), env.rank)
    except OSError as error:
        raise ConfigError(
            "run.output_dir",
            output_dir,
            f"cannot be written ({error})",
            "set a folder that can be written",
        ) from None
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    host, process = socket.gethostname(), os.getpid()
    print(
        f"{START_OF_RUN}{now} rank {env.rank} of {env.world_size} on {host}, process {process}",
        file=log,
    )
    lines.write("INFO", "start", world_size=env.world_size, process=process)
    return log, lines


class _LogFile(io.TextIOWrapper):
    """A text file that ignores write errors: a full disk must not stop training."""

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


def _redirect(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


@contextlib.contextmanager
def _logger(streams: LogStreams, env: RankEnv) -> Iterator[None]:
    to_log = logging.StreamHandler(streams.log)
    to_log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [to_log, streams.lines]
    if env.rank == 0:
        to_console = logging.StreamHandler(streams.out)
        to_console.setFormatter(_ConsoleFormatter())
        handlers.append(to_console)
    logger = logging.getLogger("megatrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = handlers
    try:
        yield
    finally:
        logger.handlers = []
        streams.lines.close()


@contextlib.contextmanager
def console_logger() -> Iterator[None]:
    """Prints log lines to standard output, in a process without the streams of a rank."""
    logger = logging.getLogger("megatrain")
    if logger.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ConsoleFormatter())
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


class RankJsonLog(logging.Handler):
    """Writes log records as JSON lines with the rank's current step."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.host = socket.gethostname()
        self.step = 0
        self._file: LineFile | None = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.levelname, record.getMessage())

    def write(self, level: str, message: str, **fields: Any) -> None:
        """Writes a line of the JSON log only; write errors are ignored."""
        line = {
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "level": level,
            "rank": self.rank,
            "host": self.host,
            "step": self.step,
            "message": message,
            **fields,
        }
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(line)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None


def rank_json_log() -> RankJsonLog | None:
    """Returns the JSON log of this process; None if it is not a rank of a run."""
    handlers = logging.getLogger("megatrain").handlers
    return next((handler for handler in handlers if isinstance(handler, RankJsonLog)), None)


class _ConsoleFormatter(logging.Formatter):
    """The bare message, with the level in front from warnings on."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
