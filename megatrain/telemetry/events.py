"""Events of a run in the order in which they happened: RUN/events.jsonl, one JSON object per line.

    {"time": "2026-11-24T23:31:02.412+00:00", "event": "save", "step": 200,
     "path": "run/checkpoints/step-00000200", "seconds": 3.1}

metrics.jsonl has each step once and drops steps that a resume repeats. Events are never removed, so
failures, restarts and lost steps can be read from them. Each line is appended with one write; a
line that a kill or a full disk truncated is skipped by readers. `step` is the last finished step,
or None.
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

EventName = Literal[
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
"""`stop` is a run that stopped before its last step; `finish` one that completed it."""


class Event(NamedTuple):
    """One line: time with its zone, name, last finished step, and the other fields."""

    time: datetime
    event: str
    step: int | None
    fields: dict[str, Any]


class EventLog:
    """Appends to a run's events; without a folder, as on all ranks but one, it writes nothing."""

    def __init__(self, run_folder: Path | None) -> None:
        self._file = None if run_folder is None else LineFile(run_folder / FILE_NAME)

    def write(self, event: EventName, *, step: int | None = None, **fields: Any) -> None:
        """Appends an event. Write errors are logged and otherwise ignored."""
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
    run_folder: Path, cause: str, *, step: int | None, since: datetime, is_user_error: bool = False
) -> None:
    """Appends the `fail` event of a run whose ranks can no longer write it; ignores write errors.

    Args:
        run_folder: folder of the run. cause: description of the failure. step: last finished step.
        since: start of the attempt. If a `fail` or `stall` event is newer, none is written.
        is_user_error: True for errors in the user's settings, recorded only after `start`.
    """
    with contextlib.suppress(OSError):
        newer = {event.event for event in read(run_folder) if event.time >= since}
        if not newer & {"fail", "stall"} and ("start" in newer or not is_user_error):
            with EventLog(run_folder) as events:
                events.write("fail", step=step, cause=cause)


def read(run_folder: Path) -> Iterator[Event]:
    """Yields a run's events, the oldest first; skips invalid lines; none without a file."""
    for raw in files.read(run_folder / FILE_NAME):
        event = _parse_event(raw)
        if event is not None:
            yield event


def _parse_event(raw: dict[str, Any]) -> Event | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        time = datetime.fromisoformat(raw.pop("time"))
        name = raw.pop("event")
        step = raw.pop("step", None)
        has_step = step is None or type(step) is int
        if time.tzinfo is not None and isinstance(name, str) and has_step:
            return Event(time, name, step, raw)
    return None
