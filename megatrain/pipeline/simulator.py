"""How long a schedule takes: when each action starts and ends, given how long each kind of action takes on each stage.

A rank does one action at a time, in its order, and starts it as soon as what it takes in is there. A message takes a while
between two ranks and none on one rank, and ranks compute while messages travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatrain.pipeline.communication import ScheduleError
from megatrain.pipeline.schedule import (
    Action,
    Message,
    Placement,
    Schedule,
    message,
    peak_activations,
)


@dataclass(frozen=True)
class Times:
    """How long one microbatch takes, in any unit: computing by stage, and a message from one rank to another.

    A whole backward (B) takes as long as its two parts.
    """

    forward: list[float]
    input_gradient: list[float]
    weight_gradient: list[float]
    send: float = 0.0

    def of(self, action: Action, stage: int) -> float:
        """How long the action takes on the stage."""
        forward, input_gradient, weight_gradient = (
            self.forward[stage],
            self.input_gradient[stage],
            self.weight_gradient[stage],
        )
        return {
            "F": forward,
            "B": input_gradient + weight_gradient,
            "I": input_gradient,
            "W": weight_gradient,
        }[action.kind]


def even_times(
    placement: Placement,
    *,
    forward: float,
    input_gradient: float,
    weight_gradient: float,
    send: float = 0.0,
) -> Times:
    """Times by stage of a model that is cut evenly, from a microbatch's times on all of one rank's chunks together.

    So schedules with one and with several chunks a rank can be compared: a rank has the same work in all.
    """

    def share(whole: float) -> list[float]:
        return [whole / placement.chunks] * placement.stages

    return Times(share(forward), share(input_gradient), share(weight_gradient), send)


class Span(NamedTuple):
    """An action with its start and end."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time."""

    schedule: Schedule
    spans: list[list[Span]]
    """By rank."""

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> list[float]:
        """Time that each rank computes."""
        return [sum(span.end - span.start for span in spans) for spans in self.spans]

    @property
    def bubble(self) -> float:
        """The idle share of ranks x makespan."""
        return 1 - sum(self.busy) / (len(self.spans) * self.makespan)

    @property
    def peak_activations(self) -> list[int]:
        """By rank, in microbatch-chunks."""
        return [peak_activations(actions) for actions in self.schedule.actions]


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Start every action as early as its rank and what it takes in allow. Raises ScheduleError if ranks wait for ever."""
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    arrivals: dict[tuple[Message, int, int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while len(spans[rank]) < len(actions):
                span = _next_span(
                    schedule.placement,
                    rank,
                    actions[len(spans[rank])],
                    spans[rank],
                    arrivals,
                    times,
                )
                if span is None:
                    break
                spans[rank].append(span)
                moved = True
    if any(len(done) < len(actions) for done, actions in zip(spans, schedule.actions, strict=True)):
        raise ScheduleError("ranks wait for each other for ever")
    return Timeline(schedule, spans)


def _next_span(
    placement: Placement,
    rank: int,
    action: Action,
    done: list[Span],
    arrivals: dict[tuple[Message, int, int, int], float],
    times: Times,
) -> Span | None:
    """The action in time, or None as long as what it takes in is not made; what it makes goes into `arrivals`."""
    start = done[-1].end if done else 0.0
    if placement.taken_from(rank, action) is not None:
        arrival = arrivals.get((message(action.kind), action.microbatch, rank, action.chunk))
        if arrival is None:
            return None
        start = max(start, arrival)
    end = start + times.of(action, placement.stage(rank, action.chunk))
    target = placement.given_to(rank, action)
    if target is not None:
        travel = times.send if target.rank != rank else 0.0
        arrivals[message(action.kind), action.microbatch, target.rank, target.chunk] = end + travel
    return Span(action, start, end)
