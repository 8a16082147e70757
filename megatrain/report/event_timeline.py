"""What a run's events tell: where it was started again, went back or stood still, how it ended, and its events in rows to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from megatrain.report.chart import Mark
from megatrain.telemetry.events import Event

MOST_ROWS = 200
_FOLDED = 4
"""As many events of a kind one after the other are one row, where each of them says little."""
_TOLD = ("reason", "what", "cause", "error", "why")
"""Fields that are sentences; earlier versions wrote `why` for `reason`."""
_ENDS = {"finish": "finished", "stop": "stopped, to go on later", "fail": "failed", "stall": "hung"}


class TimelineRow(NamedTuple):
    """One event, or several of a kind in a row."""

    time: datetime
    event: str
    number: int
    first_step: int | None
    last_step: int | None
    words: str


class EventTimeline(NamedTuple):
    """Of the run that is in the folder now; what an earlier one left there before it was begun afresh is not told."""

    events: list[Event]
    start: Event | None
    """The last one."""
    end: str | None
    """In words; None while the run goes on, or where nobody was left to say."""
    restarts: int
    marks: list[Mark]

    def count(self, name: str) -> int:
        return sum(event.event == name for event in self.events)


def read_timeline(events: Iterable[Event]) -> EventTimeline:
    """The story of the events of a run's folder, the oldest first."""
    kept = _since_begun_afresh(list(events))
    starts = [place for place, event in enumerate(kept) if event.event == "start"]
    marks = [
        Mark(_failed_step(kept[before:place]) or _first_step(kept[place + 1 :]), "restart")
        for before, place in pairwise(starts)
    ]
    marks += [
        Mark(event.step or 0, event.event)  # type: ignore[arg-type]
        for event in kept
        if event.event in ("rollback", "stall", "spike")
    ]
    return EventTimeline(
        kept,
        kept[starts[-1]] if starts else None,
        _end(kept[-1]) if kept else None,
        max(0, len(starts) - 1),
        marks,
    )


def _end(last: Event) -> str | None:
    if last.event not in _ENDS:
        return None
    where = (
        f"{'in' if last.event == 'stall' else 'after'} step {last.step}"
        if last.step
        else "before its first step was done"
    )
    has_failed = last.event in ("fail", "stall")
    names = ("error", "cause") if has_failed else ("reason", "why")
    why = next(
        (str(last.fields[name]).partition("\n")[0] for name in names if last.fields.get(name)), ""
    )
    given_up = last.fields.get("reason") if has_failed else None
    return (
        f"{_ENDS[last.event]} {where}"
        + (f": {why}" if why else "")
        + (f"; not restarted: {given_up}" if given_up else "")
    )


def rows(events: Iterable[Event]) -> Iterator[TimelineRow]:
    """Rows of the events in turn; saves and skips that follow each other are put together."""
    for name, run in groupby(events, key=lambda event: event.event):
        same = list(run)
        if name in ("save", "skip") and len(same) >= _FOLDED:
            yield TimelineRow(
                same[-1].time, name, len(same), same[0].step, same[-1].step, _means(same)
            )
        else:
            for event in same:
                yield TimelineRow(event.time, name, 1, event.step, event.step, said(event.fields))


def _since_begun_afresh(events: list[Event]) -> list[Event]:
    """From the last start that was told to resume nothing, unless a supervisor made that start again."""
    begin = 0
    for place, event in enumerate(events):
        again = place > 0 and events[place - 1].event == "restart"
        if event.event == "start" and event.fields.get("resume") == "never" and not again:
            begin = place
    return events[begin:]


def _failed_step(start_to_start: list[Event]) -> int | None:
    """The last step that a start came to, where somebody told of its failure."""
    told = [
        event.step
        for event in start_to_start
        if event.event in ("restart", "fail", "stall") and event.step is not None
    ]
    return told[-1] if told else None


def _first_step(after_start: list[Event]) -> int:
    """The step that a start went on from; 0 where it did not come so far."""
    for event in after_start:
        if event.event == "start":
            break
        if event.event == "resume":
            return event.step or 0
    return 0


def _means(events: list[Event]) -> str:
    """Of the numbers that all of them have; what is text, of the last."""
    means: dict[str, Any] = {}
    for name, value in events[-1].fields.items():
        numbers: list[Any] = [event.fields.get(name) for event in events]
        if all(isinstance(number, float) for number in numbers):
            means[f"{name} on average"] = sum(numbers) / len(numbers)
        else:
            means[name] = value
    return said(means)


def said(fields: dict[str, Any]) -> str:
    """An event's fields in words."""
    return ", ".join(_said(fields))


def _said(fields: dict[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{name}: {' '.join(_said(value))}"
        elif isinstance(value, list):
            shown = " ".join(str(item) for item in value[:4])
            yield f"{name} {shown}" + (f" and {len(value) - 4} more" if len(value) > 4 else "")
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            text = text if len(text) <= 300 else text[:297] + "..."
            yield text if name in _TOLD else f"{name.replace('_', ' ')} {text}"
