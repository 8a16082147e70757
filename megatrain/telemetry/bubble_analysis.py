"""Analysis of traced steps: computing and waiting of each rank, and times of stages and layers.

Within the span of a pipeline's actions, from the start of the first to the end of the last, a rank
computes or waits. Its waiting is split by simulating the same actions under ever fewer assumptions,
always without communication:

    even     every stage takes the mean time of all stages for each kind of action
    stages   every stage takes its own mean
    actions  every action takes its measured time
    span     the measured span

    waiting for a neighbour   waiting in `even`: the schedule's own bubble
    imbalance of the stages   waiting in `stages` minus that
    uneven microbatches       waiting in `actions` minus waiting in `stages`
    communication             the rest: messages in transit, and the host between actions

The parts add up to the rank's waiting. A part can be negative: the slowest stage waits less than it
would in an even pipeline. Numbers are means over traced steps, replicas and tensor ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatrain.pipeline.schedule import (
    Action,
    Kind,
    Message,
    Placement,
    Schedule,
    input_message,
    payload_of,
)
from megatrain.pipeline.simulator import Timeline, Times, simulate
from megatrain.telemetry.trace_format import RankTrace, StepTrace, schedule_of

KindTimes = dict[tuple[Kind, int], float]
"""Seconds of one action by its kind and stage."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes(Times):
    """Times of each kind of action on each stage; `by_action` overrides them by single actions."""

    by_kind: KindTimes
    by_action: dict[tuple[Action, int], float] | None = None

    def duration(self, action: Action, stage: int) -> float:
        if self.by_action is not None:
            return self.by_action[action, stage]
        return self.by_kind[action.kind, stage]


def simulate_measured(
    schedule: Schedule,
    by_kind: KindTimes,
    *,
    by_action: dict[tuple[Action, int], float] | None = None,
    send: float = 0.0,
) -> Timeline:
    """Simulates a schedule with measured times."""
    times = MeasuredTimes([], [], [], send, by_kind=by_kind, by_action=by_action)
    return simulate(schedule, times)


# -- breakdown of a step -------------------------------------------------------------------------


class TimeBreakdown(NamedTuple):
    """Seconds of one rank within a step's span; the module's docstring defines the parts."""

    compute: float
    schedule: float
    imbalance: float
    microbatches: float
    communication: float

    @property
    def waiting(self) -> float:
        return self.schedule + self.imbalance + self.microbatches + self.communication

    @property
    def span(self) -> float:
        return self.compute + self.waiting


def span_of(pipeline: list[RankTrace]) -> float:
    """Returns the seconds from the start of the first action to the end of the last."""
    return max(trace.actions[-1].end for trace in pipeline) - first_start(pipeline)


def first_start(pipeline: list[RankTrace]) -> float:
    """Returns the time at which the first action began to compute, by rank 0's clock."""
    return min(trace.actions[0].ready for trace in pipeline)


def break_down_waiting(pipeline: list[RankTrace]) -> list[TimeBreakdown]:
    """Returns the breakdown of each rank of one pipeline in one step."""
    schedule, span = schedule_of(pipeline), span_of(pipeline)
    by_action = _action_seconds(pipeline)
    by_kind = _mean_by_kind(by_action)
    even = simulate_measured(schedule, average_over_stages(by_kind))
    stages = simulate_measured(schedule, by_kind)
    actions = simulate_measured(schedule, by_kind, by_action=by_action)
    breakdowns = []
    for rank, compute in enumerate(actions.busy):
        waits = [timeline.makespan - timeline.busy[rank] for timeline in (even, stages, actions)]
        breakdowns.append(
            TimeBreakdown(
                compute=compute,
                schedule=waits[0],
                imbalance=waits[1] - waits[0],
                microbatches=waits[2] - waits[1],
                communication=span - compute - waits[2],
            )
        )
    return breakdowns


def average_over_stages(by_kind: KindTimes) -> KindTimes:
    """Returns times in which each stage has the mean of all stages for each kind."""
    seconds: dict[Kind, list[float]] = {}
    for (kind, _), value in by_kind.items():
        seconds.setdefault(kind, []).append(value)
    means = {kind: statistics.fmean(values) for kind, values in seconds.items()}
    return {(kind, stage): means[kind] for kind, stage in by_kind}


def _action_seconds(pipeline: list[RankTrace]) -> dict[tuple[Action, int], float]:
    """Returns the computing time of each action by action and stage."""
    return {
        (a.action, trace.placement.stage(trace.pipeline, a.action.chunk)): a.end - a.ready
        for trace in pipeline
        for a in trace.actions
    }


def _mean_by_kind(by_action: dict[tuple[Action, int], float]) -> KindTimes:
    found: dict[tuple[Kind, int], list[float]] = {}
    for (action, stage), seconds in by_action.items():
        found.setdefault((action.kind, stage), []).append(seconds)
    return {key: statistics.fmean(seconds) for key, seconds in found.items()}


def message_times(pipeline: list[RankTrace]) -> list[float]:
    """Returns the transit times of messages that their receivers were waiting for.

    Each is the time from the end of the sender's action to the start of the receiver's.
    """
    placement = pipeline[0].placement
    sent: dict[tuple[int, Message], float] = {}
    for trace in pipeline:
        for a in trace.actions:
            consumer = placement.consumer(trace.pipeline, a.action)
            if consumer is not None and consumer.rank != trace.pipeline:
                message = Message(payload_of(a.action.kind), a.action.microbatch, consumer.chunk)
                sent[consumer.rank, message] = a.end
    seconds = []
    for trace in pipeline:
        for a in trace.actions:
            if a.action.kind == "W":
                continue
            end = sent.get((trace.pipeline, input_message(a.action)))
            if end is not None and end > a.start:
                seconds.append(max(a.ready - end, 0.0))
    return seconds


# -- profile of a run ----------------------------------------------------------------------------


class StageTimes(NamedTuple):
    """Seconds of one microbatch on one stage; a backward includes I and W."""

    stage: int
    rank: int
    layers: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class LayerTimes(NamedTuple):
    """Seconds of one microbatch in one layer; the backward as far as it was measured."""

    layer: int
    title: str
    stage: int
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineTimes:
    """Mean times over all traced pipelines."""

    schedule: Schedule
    titles: list[str]
    """Titles of all layers of the model."""
    cut: list[range]
    """The layers of each stage."""
    by_kind: KindTimes
    layers: dict[tuple[Kind, int], float]
    """By kind of action and layer."""
    step_seconds: float
    message_seconds: float
    """Median transit time of messages that were waited for; 0 if there were none."""

    @property
    def placement(self) -> Placement:
        return self.schedule.placement


def measure_pipelines(
    steps: list[StepTrace], average: Callable[[list[float]], float] = statistics.fmean
) -> PipelineTimes:
    """Returns the times of traced steps; `average` is taken over the actions of each kind.

    The steps may have several schedules of one placement; the result has that of the first.
    """
    pipelines = [pipeline for step in steps for pipeline in step.pipelines()]
    stages = pipelines[0][0].stages
    kinds: dict[tuple[Kind, int], list[float]] = {}
    layers: dict[tuple[Kind, int], list[float]] = {}
    for pipeline in pipelines:
        for (action, stage), seconds in _action_seconds(pipeline).items():
            kinds.setdefault((action.kind, stage), []).append(seconds)
        for a in (a for trace in pipeline for a in trace.actions):
            for layer, seconds in a.layers.items():
                layers.setdefault((a.action.kind, layer), []).append(seconds)
    messages = [seconds for pipeline in pipelines for seconds in message_times(pipeline)]
    bounds = accumulate((len(titles) for titles in stages), initial=0)
    return PipelineTimes(
        schedule_of(pipelines[0]),
        [title for titles in stages for title in titles],
        [range(first, last) for first, last in pairwise(bounds)],
        {key: average(values) for key, values in kinds.items()},
        {key: average(values) for key, values in layers.items()},
        statistics.fmean(step.seconds for step in steps),
        statistics.median(messages) if messages else 0.0,
    )


@dataclass(frozen=True)
class TimelineView:
    """The slowest pipeline of the step with the median span, measured and ideal."""

    step: int
    pipeline: list[RankTrace]
    ideal: Timeline
    """All stages even, without communication."""


@dataclass(frozen=True)
class PipelineProfile:
    """All numbers of the profile page; times in seconds."""

    measured: PipelineTimes
    name: str
    steps: list[int]
    replicas: int
    tensor: int
    breakdowns: list[TimeBreakdown]
    """By pipeline rank."""
    peak_memory: list[int]
    """Bytes by pipeline rank, the maximum over steps and replicas."""
    memory: str
    """Description of the measured memory."""
    clock_error: float
    stages: list[StageTimes]
    layers: list[LayerTimes]
    timeline: TimelineView

    @property
    def span(self) -> float:
        return self.breakdowns[0].span

    @property
    def total(self) -> TimeBreakdown:
        """The mean over ranks."""
        return mean_breakdown(self.breakdowns)


def mean_breakdown(breakdowns: list[TimeBreakdown]) -> TimeBreakdown:
    """Returns the mean of each part."""
    return TimeBreakdown(*(statistics.fmean(parts) for parts in zip(*breakdowns, strict=True)))


def profile_pipeline(steps: list[StepTrace]) -> PipelineProfile:
    """Returns the profile of a run's traced steps."""
    pipelines = [pipeline for step in steps for pipeline in step.pipelines()]
    by_rank = zip(*(break_down_waiting(pipeline) for pipeline in pipelines), strict=True)
    measured = measure_pipelines(steps)
    traces = [trace for step in steps for trace in step.ranks]
    run = traces[0].config.get("run", {})
    return PipelineProfile(
        measured=measured,
        name=run.get("name") or run.get("output_dir", ""),
        steps=[step.step for step in steps],
        replicas=1 + max(trace.data for trace in traces),
        tensor=1 + max(trace.tensor for trace in traces),
        breakdowns=[mean_breakdown(list(breakdowns)) for breakdowns in by_rank],
        peak_memory=[
            max(trace.peak_memory for trace in traces if trace.pipeline == rank)
            for rank in range(measured.placement.ranks)
        ],
        memory=traces[0].memory,
        clock_error=max(trace.clock_error for trace in traces),
        stages=_stage_times(measured),
        layers=_layer_times(measured),
        timeline=_timeline_view(steps),
    )


def backward_seconds(times: KindTimes, index: int) -> float:
    """Returns the time of a backward on a stage or layer: B, or I + W, or the mean of both."""
    if ("I", index) not in times:
        return times.get(("B", index), 0.0)
    split = times["I", index] + times.get(("W", index), 0.0)
    return statistics.fmean([split, times["B", index]]) if ("B", index) in times else split


def _stage_times(measured: PipelineTimes) -> list[StageTimes]:
    found = []
    for stage, layers in enumerate(measured.cut):
        first, last = measured.titles[layers.start], measured.titles[layers.stop - 1]
        found.append(
            StageTimes(
                stage,
                measured.placement.location(stage).rank,
                first if len(layers) == 1 else f"{first} to {last}",
                measured.by_kind["F", stage],
                backward_seconds(measured.by_kind, stage),
            )
        )
    return found


def _layer_times(measured: PipelineTimes) -> list[LayerTimes]:
    return [
        LayerTimes(
            layer,
            measured.titles[layer],
            stage,
            measured.layers.get(("F", layer), 0.0),
            backward_seconds(measured.layers, layer),
        )
        for stage, layers in enumerate(measured.cut)
        for layer in layers
    ]


def _timeline_view(steps: list[StepTrace]) -> TimelineView:
    slowest = [(max(step.pipelines(), key=span_of), step.step) for step in steps]
    pipeline, step = sorted(slowest, key=lambda found: span_of(found[0]))[(len(slowest) - 1) // 2]
    by_kind = _mean_by_kind(_action_seconds(pipeline))
    ideal = simulate_measured(schedule_of(pipeline), average_over_stages(by_kind))
    return TimelineView(step, pipeline, ideal)
