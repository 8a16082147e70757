"""Simulates a schedule: start and end of each action, from the time of each kind on each stage.

A rank runs one action at a time, in its order, and starts it once its input has arrived. Messages
take time between ranks and none within a rank; ranks compute while messages travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatrain.pipeline.schedule import (
    Action,
    Message,
    Placement,
    Schedule,
    input_message,
    payload_of,
    peak_activations,
)
from megatrain.pipeline.verify import ScheduleError


@dataclass(frozen=True)
class Times:
    """Time of one microbatch, in any unit: computation by stage, and of one message between ranks.

    B takes as long as I and W together.
    """

    forward: list[float]
    input_gradient: list[float]
    weight_gradient: list[float]
    send: float = 0.0

    def duration(self, action: Action, stage: int) -> float:
        """Returns the time of an action on a stage."""
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "I":
            return self.input_gradient[stage]
        if action.kind == "W":
            return self.weight_gradient[stage]
        return self.input_gradient[stage] + self.weight_gradient[stage]


def even_times(
    placement: Placement,
    *,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
    send: float = 0.0,
) -> Times:
    """Returns equal times for all stages, from the times of one microbatch in all chunks of a rank.

    A rank has the same work with one and with several chunks, so schedules can be compared.
    """

    def by_stage(rank_time: float) -> list[float]:
        return [rank_time / placement.chunks] * placement.stages

    return Times(by_stage(forward), by_stage(input_gradient), by_stage(weight_gradient), send)


class Span(NamedTuple):
    """An action with its start and end."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Start and end of each action of a schedule."""

    schedule: Schedule
    spans: list[list[Span]]
    """By rank."""

    @property
    def makespan(self) -> float:
        """Time until the last rank has finished."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> list[float]:
        """Computing time of each rank."""
        return [sum(span.end - span.start for span in spans) for spans in self.spans]

    @property
    def bubble(self) -> float:
        """Idle share of ranks x makespan."""
        return 1 - sum(self.busy) / (len(self.spans) * self.makespan)

    @property
    def peak_activations(self) -> list[int]:
        """Most activations held by each rank, each of one microbatch in one chunk."""
        return [peak_activations(actions) for actions in self.schedule.actions]


def simulate(schedule: Schedule, times: Times | None = None) -> Timeline:
    """Simulates a schedule, with each action as early as its rank and its input allow.

    Args:
        schedule: the schedule, such as that of `make_schedule`. times: the time of each kind of
        action on each stage, and of a message. By default F, I and W
            take 1 on each rank, B takes 2, and messages take none.

    Returns:
        The timeline, with `makespan`, `bubble`, `busy` and `peak_activations`.

    Raises:
        ScheduleError: if the ranks deadlock.

    Example:
        >>> from megatrain.pipeline import make_schedule, simulate
        >>> timeline = simulate(make_schedule("zb-h1", ranks=4, microbatches=8))
        >>> timeline.makespan, round(timeline.bubble, 3), timeline.peak_activations
        (27.0, 0.111, [4, 4, 4, 4])
    """
    times = even_times(schedule.placement) if times is None else times
    simulation = _Simulation(schedule, times)
    progress = True
    while progress:
        progress = sum(simulation.advance(rank) for rank in range(len(schedule.actions))) > 0
    for spans, actions in zip(simulation.spans, schedule.actions, strict=True):
        if len(spans) < len(actions):
            raise ScheduleError("deadlock: ranks wait for each other")
    return Timeline(schedule, simulation.spans)


class _Simulation:
    """Spans of the actions done so far, and arrival times of messages by receiving rank."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule = schedule
        self.times = times
        self.spans: list[list[Span]] = [[] for _ in schedule.actions]
        self.arrivals: dict[tuple[int, Message], float] = {}

    def advance(self, rank: int) -> bool:
        """Runs a rank's actions until one lacks its input; returns True if any was run."""
        spans = self.spans[rank]
        before = len(spans)
        for action in self.schedule.actions[rank][before:]:
            start = self._start(rank, action, spans[-1].end if spans else 0.0)
            if start is None:
                break
            stage = self.schedule.placement.stage(rank, action.chunk)
            spans.append(Span(action, start, start + self.times.duration(action, stage)))
            self._send(rank, spans[-1])
        return len(spans) > before

    def _start(self, rank: int, action: Action, free: float) -> float | None:
        if self.schedule.placement.producer(rank, action) is None:
            return free
        arrival = self.arrivals.get((rank, input_message(action)))
        return None if arrival is None else max(free, arrival)

    def _send(self, rank: int, span: Span) -> None:
        consumer = self.schedule.placement.consumer(rank, span.action)
        if consumer is not None:
            action = span.action
            message = Message(payload_of(action.kind), action.microbatch, consumer.chunk)
            travel = self.times.send if consumer.rank != rank else 0.0
            self.arrivals[consumer.rank, message] = span.end + travel
