"""Where a rank's words go: the console for the reader of the run, a log file a rank for everything else.

deepspeed, torch and the libraries below them print to file descriptors 1 and 2, some from C++. Those are pointed at
`logs/rank-NNNNN.log` in the run's folder, and the console is kept apart for the one logger, which speaks there on
rank 0 only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from megatrain.config import Config
from megatrain.errors import ConfigError
from megatrain.place import Place

# Begins the line that a run appends to its logs first.
START_OF_RUN = "=== "


class Streams(NamedTuple):
    """The console as the rank found it, and its log file."""

    out: TextIO
    err: TextIO
    log: TextIO


def log_path(config: Config, rank: int) -> Path:
    return Path(config.run.output_dir) / "logs" / f"rank-{rank:05d}.log"


@contextlib.contextmanager
def rank_streams(config: Config, place: Place) -> Iterator[Streams]:
    """Send file descriptors 1 and 2 to the rank's log (not with run.verbose) and set up the logger, until the end."""
    with (
        _open_log(config, place) as log,
        os.fdopen(os.dup(1), "w", buffering=1) as out,
        os.fdopen(os.dup(2), "w", buffering=1) as err,
    ):
        streams = Streams(out, err, log)
        if not config.run.verbose:
            _point_at(log.fileno(), log.fileno())
        faulthandler.enable(file=log)
        try:
            with _logger(streams, place):
                yield streams
        finally:
            faulthandler.disable()
            _point_at(out.fileno(), err.fileno())


def _open_log(config: Config, place: Place) -> TextIO:
    path = log_path(config, place.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise ConfigError("run.output_dir", config.run.output_dir, f"cannot be written ({error})") from None
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    host, process = socket.gethostname(), os.getpid()
    print(f"{START_OF_RUN}{now} rank {place.rank} of {place.world_size} on {host}, process {process}", file=log)
    return log


def _point_at(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


@contextlib.contextmanager
def _logger(streams: Streams, place: Place) -> Iterator[None]:
    to_log = logging.StreamHandler(streams.log)
    to_log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [to_log]
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


class _ConsoleFormatter(logging.Formatter):
    """The bare message; a word in front when it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
