"""The events of a run: its restarts, rollbacks and hangs, its end, and rows for a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from megatrain.report.chart import Mark
from megatrain.telemetry.events import Event

MAX_ROWS = 200
_MIN_FOLDED = 4
"""Consecutive saves or skips that are folded into one row."""
_SENTENCES = ("reason", "what", "cause", "error")
"""Fields that are shown without their names."""
_OLD_FIELDS = {
    "why": "reason",
    "stalled": "blocking_seconds",
    "first": "first_sample",
    "last": "last_sample",
}
"""Fields of older versions and their names today."""
_ENDS = {
    "finish": "finished",
    "stop": "stopped (resumable)",
    "fail": "failed",
    "stall": "hung",
}


class TimelineRow(NamedTuple):
    """One event, or several consecutive events of one kind."""

    time: datetime
    event: str
    num_events: int
    first_step: int | None
    last_step: int | None
    description: str


class EventTimeline(NamedTuple):
    """Events of the run that the folder contains now, without those of runs it replaced."""

    events: list[Event]
    start: Event | None
    """The last one."""
    end: str | None
    """Description; None while the run is running, and if no end was logged."""
    restarts: int
    marks: list[Mark]

    def count(self, name: str) -> int:
        return sum(event.event == name for event in self.events)


def read_timeline(events: Iterable[Event]) -> EventTimeline:
    """Returns the timeline of a run folder's events, which are ordered by time."""
    kept = _of_current_run([_with_new_names(event) for event in events])
    starts = [index for index, event in enumerate(kept) if event.event == "start"]
    marks = [
        Mark(_failed_step(kept[before:index]) or _resumed_step(kept[index + 1 :]), "restart")
        for before, index in pairwise(starts)
    ]
    marks += [
        Mark(event.step or 0, event.event)  # type: ignore[arg-type]
        for event in kept
        if event.event in ("rollback", "stall", "spike")
    ]
    return EventTimeline(
        events=kept,
        start=kept[starts[-1]] if starts else None,
        end=_end(kept[-1]) if kept else None,
        restarts=max(0, len(starts) - 1),
        marks=marks,
    )


def _with_new_names(event: Event) -> Event:
    fields = {_OLD_FIELDS.get(name, name): value for name, value in event.fields.items()}
    return event._replace(fields=fields)


def _of_current_run(events: list[Event]) -> list[Event]:
    """Returns the events since the last start with resume=never that a user made."""
    begin = 0
    for index, event in enumerate(events):
        by_supervisor = index > 0 and events[index - 1].event == "restart"
        if event.event == "start" and event.fields.get("resume") == "never" and not by_supervisor:
            begin = index
    return events[begin:]


def _failed_step(attempt: list[Event]) -> int | None:
    """Returns the last step of an attempt, if its failure was logged."""
    failures = ("restart", "fail", "stall")
    steps = [event.step for event in attempt if event.event in failures and event.step is not None]
    return steps[-1] if steps else None


def _resumed_step(after_start: list[Event]) -> int:
    """Returns the step that an attempt resumed from; 0 if it did not resume."""
    for event in after_start:
        if event.event == "start":
            break
        if event.event == "resume":
            return event.step or 0
    return 0


def _end(last: Event) -> str | None:
    if last.event not in _ENDS:
        return None
    preposition = "in" if last.event == "stall" else "after"
    where = f"{preposition} step {last.step}" if last.step else "before the first step was complete"
    has_failed = last.event in ("fail", "stall")
    names = ("error", "cause") if has_failed else ("reason",)
    causes = [str(last.fields[name]).partition("\n")[0] for name in names if last.fields.get(name)]
    end = f"{_ENDS[last.event]} {where}" + (f": {causes[0]}" if causes else "")
    if has_failed and last.fields.get("reason"):
        end += f"; not restarted: {last.fields['reason']}"
    return end


def fold_events(events: Iterable[Event]) -> Iterator[TimelineRow]:
    """Yields rows in the order of the events; folds consecutive saves, and consecutive skips."""
    for name, group in groupby(events, key=lambda event: event.event):
        same = list(group)
        if name in ("save", "skip") and len(same) >= _MIN_FOLDED:
            first, last = same[0], same[-1]
            description = format_fields(_average(same))
            yield TimelineRow(last.time, name, len(same), first.step, last.step, description)
        else:
            for event in same:
                description = format_fields(event.fields)
                yield TimelineRow(event.time, name, 1, event.step, event.step, description)


def _average(events: Sequence[Event]) -> dict[str, Any]:
    """Returns the means of fields that are floats in all events, and other fields of the last."""
    means: dict[str, Any] = {}
    for name, value in events[-1].fields.items():
        numbers: list[Any] = [event.fields.get(name) for event in events]
        if all(isinstance(number, float) for number in numbers):
            means[f"mean {name}"] = sum(numbers) / len(numbers)
        else:
            means[name] = value
    return means


def format_fields(fields: dict[str, Any]) -> str:
    """Returns an event's fields as one line of text."""
    return ", ".join(_format_fields(fields))


def _format_fields(fields: dict[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{name}: {' '.join(_format_fields(value))}"
        elif isinstance(value, list):
            shown = " ".join(str(item) for item in value[:4])
            yield f"{name} {shown}" + (f" and {len(value) - 4} more" if len(value) > 4 else "")
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            text = text if len(text) <= 300 else text[:297] + "..."
            yield text if name in _SENTENCES else f"{name.replace('_', ' ')} {text}"
