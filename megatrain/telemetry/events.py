"""What happened to a run, in the order in which it happened: RUN/events.jsonl, one JSON object a line.

    {"time": "2026-11-24T23:31:02.412+00:00", "event": "save", "step": 200, "path": "run/checkpoints/step-00000200", "seconds": 3.1, "stalled": 0.2}

metrics.jsonl says of every step how it went, once, and forgets what a resume does again. Here nothing is taken back: a kill, the
restart and the steps that were lost in between can be read off it. A line is appended with one write, so it is whole or, after
a kill or on a full disk, torn; torn lines are read over. `step` is the last step done, where there is one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from megatrain import files
from megatrain.files import LineFile

logger = logging.getLogger("megatrain")

FILE_NAME = "events.jsonl"

Name = Literal[
    "start",
    "resume",
    "evaluate",
    "save",
    "best",
    "skip",
    "spike",
    "rollback",
    "stall",
    "restart",
    "fail",
    "stop",
    "finish",
]
"""`stop` is a run that was asked to, and will go on; `finish` one that has nothing left to do."""


class Event(NamedTuple):
    """A line: when (with its zone), what, after which step, and what else is said of it."""

    time: datetime
    event: str
    step: int | None
    fields: dict[str, Any]


class EventLog:
    """Appends to a run's events; without a folder it writes nothing, as on all ranks but one."""

    def __init__(self, run_folder: Path | None) -> None:
        self._file = None if run_folder is None else LineFile(run_folder / FILE_NAME)

    def write(self, event: Name, *, step: int | None = None, **fields: Any) -> None:
        """Append a line. A run goes on where it cannot be written: it is worth more than its story."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        try:
            self._file.write({"time": now, "event": event, "step": step, **fields})
        except OSError as error:
            logger.warning(f"{FILE_NAME} cannot be written: {error.strerror}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def write_failure(
    run_folder: Path, cause: str, *, step: int | None, since: datetime, of_user: bool = False
) -> None:
    """Append the `fail` of a run that cannot say so itself; nothing where its end since then is told already, by the rank that raised
    or as a stall. What the user wrote (`of_user`) is no event of a run that has not begun."""
    with contextlib.suppress(OSError):  # who speaks has ranks to end
        told = {event.event for event in read(run_folder) if event.time >= since}
        if not told & {"fail", "stall"} and ("start" in told or not of_user):
            with EventLog(run_folder) as events:
                events.write("fail", step=step, cause=cause)


def read(run_folder: Path) -> Iterator[Event]:
    """The events of a run's folder, the oldest first; none where the run wrote none. What is no whole event is left out."""
    for raw in files.read(run_folder / FILE_NAME):
        event = _event(raw)
        if event is not None:
            yield event


def _event(raw: dict[str, Any]) -> Event | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        time, name, step = (
            datetime.fromisoformat(raw.pop("time")),
            raw.pop("event"),
            raw.pop("step", None),
        )
        if (
            time.tzinfo is not None
            and isinstance(name, str)
            and (step is None or type(step) is int)
        ):
            return Event(time, name, step, raw)
    return None
