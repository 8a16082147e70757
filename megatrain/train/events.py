"""What happened to a run, in the order in which it happened: RUN/events.jsonl, one JSON object a line.

    {"time": "2026-11-24T23:31:02.412+00:00", "event": "save", "step": 200, "path": "run/checkpoints/step-00000200", "seconds": 3.1, "stalled": 0.2}

metrics.jsonl says of every step how it went, once, and forgets what a resume does again. Here nothing is taken back: a kill, the
restart and the steps that were lost in between can be read off it. A line is appended with one write, so it is whole or, after
a kill or on a full disk, torn; torn lines are read over. `step` is the last step done, where there is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

logger = logging.getLogger("megatrain")

FILE_NAME = "events.jsonl"

Name = Literal["start", "resume", "evaluate", "save", "best", "skip", "spike", "rollback", "stall", "restart", "fail", "stop", "finish"]
"""`stop` is a run that was asked to, and will go on; `finish` one that has nothing left to do."""

NAMES: tuple[str, ...] = get_args(Name)


class Event(NamedTuple):
    """A line: when (with its zone), what, after which step, and what else is said of it."""

    time: datetime
    event: str
    step: int | None
    fields: dict[str, Any]


class EventLog:
    """Appends to a run's events; without a folder it writes nothing, as on all ranks but one."""

    def __init__(self, run_folder: Path | None) -> None:
        self._file: int | None = None
        if run_folder is not None:
            run_folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(run_folder / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: Name, *, step: int | None = None, **fields: Any) -> None:
        """Append a line. A run goes on where it cannot be written: it is worth more than its story."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        words = json.dumps(_plain({"time": now, "event": event, "step": step, **fields}), allow_nan=False)
        try:
            os.write(self._file, f"{self._end_of_torn_line()}{words}\n".encode())
        except OSError as error:
            logger.warning(f"{FILE_NAME} cannot be written: {error.strerror}")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _end_of_torn_line(self) -> str:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        return "\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else ""


def read(run_folder: Path) -> Iterator[Event]:
    """The events of a run's folder, the oldest first; none where the run wrote none. What is no whole event is left out."""
    path = run_folder / FILE_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            event = _event(line)
            if event is not None:
                yield event


def _event(line: str) -> Event | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        raw = json.loads(line)
        time, name, step = datetime.fromisoformat(raw.pop("time")), raw.pop("event"), raw.pop("step", None)
        if time.tzinfo is not None and isinstance(name, str) and (step is None or type(step) is int):
            return Event(time, name, step, raw)
    return None


def _plain(value: Any) -> Any:
    """For strict JSON: paths as text, and nothing for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
