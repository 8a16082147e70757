"""What a traced step tells: where each rank's time went, what each layer takes, and what would make the step faster.

Over the span of a pipeline's actions, from the first one's start to the last one's end, a rank either computes or waits. Its waiting is split by simulating the same actions under ever fewer assumptions, always without any communication:

    even     every stage takes the stages' mean time for each kind of action
    stages   every stage takes its own mean
    actions  every action takes what it really took
    span     what was measured

    waiting for a neighbour   what the rank waits in `even`: the schedule's own bubble
    imbalance of the stages   what it waits in `stages`, less that
    uneven microbatches       what it waits in `actions`, less what it waits in `stages`
    communication             the rest: messages on their way, and the host between actions

These add up to the rank's waiting. A part can be negative: the slowest stage waits less than it would in an even pipeline.
Numbers are means over the traced steps and over replicas and tensor ranks; what is added up or compared is a mean too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatrain.pipeline.schedule import Action, Kind, Payload, Placement, Schedule, payload_of
from megatrain.pipeline.simulator import Timeline, Times, simulate
from megatrain.telemetry.trace_format import RankTrace, StepTrace, schedule_of

KindTimes = dict[tuple[Kind, int], float]
"""Seconds of one action by its kind and stage."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes(Times):
    """Times of each kind of action on each stage, a whole backward's on its own; `single` are those of single actions."""

    by_kind: KindTimes
    single: dict[tuple[Action, int], float] | None = None

    def duration(self, action: Action, stage: int) -> float:
        if self.single is not None:
            return self.single[action, stage]
        return self.by_kind[action.kind, stage]


def simulated(
    schedule: Schedule,
    by_kind: KindTimes,
    *,
    single: dict[tuple[Action, int], float] | None = None,
    send: float = 0.0,
) -> Timeline:
    """The schedule with measured times."""
    return simulate(schedule, MeasuredTimes([], [], [], send, by_kind=by_kind, single=single))


# -- where the time went -----------------------------------------------------------------------------------------------


class TimeBreakdown(NamedTuple):
    """Seconds of one rank in a step's span, as the head of this file defines them."""

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
    """Seconds from the first action's start to the last one's end."""
    return max(trace.actions[-1].end for trace in pipeline) - first_start(pipeline)


def first_start(pipeline: list[RankTrace]) -> float:
    """When the first action began to compute, on rank 0's clock."""
    return min(trace.actions[0].ready for trace in pipeline)


def break_down_waiting(pipeline: list[RankTrace]) -> list[TimeBreakdown]:
    """By rank of one pipeline in one step."""
    schedule, span = schedule_of(pipeline), span_of(pipeline)
    single = _single_times(pipeline)
    by_kind = _mean_times(single)
    even, stages = simulated(schedule, even_times(by_kind)), simulated(schedule, by_kind)
    actions = simulated(schedule, by_kind, single=single)
    splits = []
    for rank, compute in enumerate(actions.busy):
        waits = [timeline.makespan - timeline.busy[rank] for timeline in (even, stages, actions)]
        splits.append(
            TimeBreakdown(
                compute,
                waits[0],
                waits[1] - waits[0],
                waits[2] - waits[1],
                span - compute - waits[2],
            )
        )
    return splits


def even_times(by_kind: KindTimes) -> KindTimes:
    """Each stage with the mean of all that do the kind."""
    kinds = {kind for kind, _ in by_kind}
    means = {
        kind: statistics.fmean(seconds for (other, _), seconds in by_kind.items() if other == kind)
        for kind in kinds
    }
    return {(kind, stage): means[kind] for kind, stage in by_kind}


def _single_times(pipeline: list[RankTrace]) -> dict[tuple[Action, int], float]:
    return {
        (a.action, trace.placement.stage(trace.pipeline, a.action.chunk)): a.end - a.ready
        for trace in pipeline
        for a in trace.actions
    }


def _mean_times(single: dict[tuple[Action, int], float]) -> KindTimes:
    found: dict[tuple[Kind, int], list[float]] = {}
    for (action, stage), seconds in single.items():
        found.setdefault((action.kind, stage), []).append(seconds)
    return {key: statistics.fmean(seconds) for key, seconds in found.items()}


def message_seconds(pipeline: list[RankTrace]) -> list[float]:
    """Of each message that its receiver was waiting for when it was sent: from the sender's end to the receiver's go."""
    placement = pipeline[0].placement
    made: dict[tuple[Payload, int, int], float] = {}
    for trace in pipeline:
        for a in trace.actions:
            if a.action.kind != "W":
                made[
                    payload_of(a.action.kind),
                    a.action.microbatch,
                    placement.stage(trace.pipeline, a.action.chunk),
                ] = a.end
    seconds = []
    for trace in pipeline:
        for a in trace.actions:
            source = placement.producer(trace.pipeline, a.action)
            if source is None or source.rank == trace.pipeline:
                continue
            sent = made[payload_of(a.action.kind), a.action.microbatch, placement.stage(*source)]
            if sent > a.start:
                seconds.append(max(a.ready - sent, 0.0))
    return seconds


# -- the whole ---------------------------------------------------------------------------------------------------------


class StageTimes(NamedTuple):
    """One microbatch on one stage, seconds; a backward with all its parts."""

    stage: int
    rank: int
    layers: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class LayerTimes(NamedTuple):
    """One microbatch in one layer, seconds; the backward as far as it could be told apart."""

    layer: int
    title: str
    stage: int
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Measured:
    """Means over all traced pipelines."""

    schedule: Schedule
    titles: list[str]
    """Of all layers of the model."""
    cut: list[range]
    """The layers of each stage."""
    by_kind: KindTimes
    layers: dict[tuple[Kind, int], float]
    """By kind of action and layer."""
    step_seconds: float
    message: float
    """Median seconds of a message that its receiver was waiting for; 0 if none did."""

    @property
    def placement(self) -> Placement:
        return self.schedule.placement


def measure(
    steps: list[StepTrace], average: Callable[[list[float]], float] = statistics.fmean
) -> Measured:
    """What the advice needs to know; `average` is taken over the actions of each kind.

    The steps may have had several schedules of one placement; the first one's counts as the measured one.
    """
    pipelines = [pipeline for step in steps for pipeline in step.pipelines()]
    stages = pipelines[0][0].stages
    kinds: dict[tuple[Kind, int], list[float]] = {}
    layers: dict[tuple[Kind, int], list[float]] = {}
    for pipeline in pipelines:
        for (action, place), taken in _single_times(pipeline).items():
            kinds.setdefault((action.kind, place), []).append(taken)
        for a in (a for trace in pipeline for a in trace.actions):
            for layer, seconds in a.layers.items():
                layers.setdefault((a.action.kind, layer), []).append(seconds)
    sent = [seconds for pipeline in pipelines for seconds in message_seconds(pipeline)]
    bounds = [0]
    for stage in stages:
        bounds.append(bounds[-1] + len(stage))
    return Measured(
        schedule_of(pipelines[0]),
        [title for stage in stages for title in stage],
        [range(first, last) for first, last in pairwise(bounds)],
        {key: average(values) for key, values in kinds.items()},
        {key: average(values) for key, values in layers.items()},
        statistics.fmean(step.seconds for step in steps),
        statistics.median(sent) if sent else 0.0,
    )


@dataclass(frozen=True)
class TimelineView:
    """One pipeline in one step, measured and ideal: the traced step whose span is the median, its slowest pipeline."""

    step: int
    pipeline: list[RankTrace]
    ideal: Timeline
    """All stages even, no communication."""


@dataclass(frozen=True)
class PipelineProfile:
    """All that the page says; times in seconds."""

    measured: Measured
    name: str
    steps: list[int]
    replicas: int
    tensor: int
    splits: list[TimeBreakdown]
    """By pipeline rank."""
    peak_memory: list[int]
    """Bytes by pipeline rank, the most of any step and replica."""
    memory: str
    clock_error: float
    stages: list[StageTimes]
    layers: list[LayerTimes]
    picture: TimelineView

    @property
    def span(self) -> float:
        return self.splits[0].span

    @property
    def total(self) -> TimeBreakdown:
        """The mean over ranks."""
        return mean_breakdown(self.splits)


def mean_breakdown(splits: list[TimeBreakdown]) -> TimeBreakdown:
    """Part by part."""
    return TimeBreakdown(*(statistics.fmean(parts) for parts in zip(*splits, strict=True)))


def profile_pipeline(steps: list[StepTrace]) -> PipelineProfile:
    """All numbers of one run's traced steps."""
    pipelines = [pipeline for step in steps for pipeline in step.pipelines()]
    by_rank = zip(*(break_down_waiting(pipeline) for pipeline in pipelines), strict=True)
    measured, everyone = measure(steps), [trace for step in steps for trace in step.ranks]
    ranks = range(measured.placement.ranks)
    first = everyone[0]
    run = first.config.get("run", {})
    return PipelineProfile(
        measured=measured,
        name=run.get("name") or run.get("output_dir", ""),
        steps=[step.step for step in steps],
        replicas=1 + max(trace.data for trace in everyone),
        tensor=1 + max(trace.tensor for trace in everyone),
        splits=[mean_breakdown(list(of_rank)) for of_rank in by_rank],
        peak_memory=[
            max(trace.peak_memory for trace in everyone if trace.pipeline == rank) for rank in ranks
        ],
        memory=first.memory,
        clock_error=max(trace.clock_error for trace in everyone),
        stages=_stage_times(measured),
        layers=_layer_times(measured),
        picture=_picture(steps),
    )


def backward_seconds(times: KindTimes, place: int) -> float:
    """Of one microbatch: whole where backwards are whole, else both parts."""
    if ("I", place) not in times:
        return times.get(("B", place), 0.0)
    split = times["I", place] + times.get(("W", place), 0.0)
    return statistics.fmean([split, times["B", place]]) if ("B", place) in times else split


def _stage_times(measured: Measured) -> list[StageTimes]:
    found = []
    for stage, layers in enumerate(measured.cut):
        first, last = measured.titles[layers.start], measured.titles[layers.stop - 1]
        title = first if len(layers) == 1 else f"{first} to {last}"
        found.append(
            StageTimes(
                stage,
                measured.placement.location(stage).rank,
                title,
                measured.by_kind["F", stage],
                backward_seconds(measured.by_kind, stage),
            )
        )
    return found


def _layer_times(measured: Measured) -> list[LayerTimes]:
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


def _picture(steps: list[StepTrace]) -> TimelineView:
    slowest = [(max(step.pipelines(), key=span_of), step.step) for step in steps]
    pipeline, step = sorted(slowest, key=lambda found: span_of(found[0]))[(len(slowest) - 1) // 2]
    return TimelineView(
        step,
        pipeline,
        simulated(schedule_of(pipeline), even_times(_mean_times(_single_times(pipeline)))),
    )
