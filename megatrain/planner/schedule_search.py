"""`parallel.schedule: auto`: which schedule, placement and cut of the layers would be fastest within a rank's memory.

Tried are the named schedules and schedules made for the very times (list_schedule.py), each with the cuts near its best ones.
Of plans that are equally fast to a hundredth, the one that takes the least memory is preferred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatrain.pipeline.schedule import Placement, Schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.simulator import Times, even_times, simulate
from megatrain.planner.cost_model import CostModel, Counts, cut_of, even_cuts, search_cuts
from megatrain.planner.list_scheduler import SchedulingRules, list_schedule
from megatrain.telemetry.bubble_analysis import MeasuredTimes

EQUAL = 0.01
"""The share by which plans may differ and count as equally fast."""
BUDGET = 50_000
"""Actions to simulate for one schedule in search of its best cut: half a second."""
LIST_COST = 8
"""How many times as long it takes to make a schedule as to simulate it."""
MOST_CHUNKS = 4
"""Chunks a rank, of interleaved schedules."""


@dataclass(frozen=True)
class ScheduleCandidate:
    """A schedule on a cut of the layers, and what it would take."""

    schedule: Schedule
    counts: Counts
    """Blocks of each stage."""
    seconds: float
    """From the first action's start to the last one's end."""
    waiting: float
    """The share of the ranks' time."""
    memory: list[float]
    """The most that each rank holds at once, in the unit of the limit."""


class Costs(Protocol):
    """What the search asks about the model and its ranks."""

    @property
    def movable(self) -> bool:
        """Whether there are other cuts than the first ones."""

    def first_cuts(self, placement: Placement) -> list[Counts]:
        """Cuts to search from; none where the placement has more stages than there are blocks."""

    def times(self, placement: Placement, counts: Counts) -> Times: ...

    def memory(self, schedule: Schedule, counts: Counts) -> list[float]:
        """By rank."""


# -- the search --------------------------------------------------------------------------------------------------------


def find_candidates(
    costs: Costs, *, ranks: int, microbatches: int, limit: float = math.inf
) -> list[ScheduleCandidate]:
    """The best plan of each kind that stays within the limit on every rank, the best of all first."""
    plans: list[ScheduleCandidate] = []
    for schedule in _named(ranks, microbatches):
        plans += _best(costs, _Fixed(schedule), limit, costs.first_cuts(schedule.placement))
    for placement in (Placement(ranks), Placement(ranks, 2, "v"), Placement(ranks, 2)):
        cuts = {plan.counts for plan in plans if plan.schedule.placement == placement}
        for rules in _rules(ranks, microbatches):
            plans += _best(
                costs,
                _Made(costs, placement, microbatches, rules),
                limit,
                [*cuts, *costs.first_cuts(placement)],
            )
    return _in_order(plans)


def _named(ranks: int, microbatches: int) -> Iterator[Schedule]:
    """Every schedule that could be best: gpipe waits as 1f1b does and holds more."""
    for name, family in SCHEDULES.items():
        if name == "gpipe" or microbatches < family.min_microbatches(ranks):
            continue
        for chunks in range(2, MOST_CHUNKS + 1) if family.any_chunks else [family.chunks]:
            yield build_schedule(name, ranks, microbatches, chunks)


def _rules(ranks: int, microbatches: int) -> list[SchedulingRules]:
    """Ranks hold what 1F1B's first rank does, or twice as much."""
    some = [
        SchedulingRules(min(held, microbatches), look_ahead=look_ahead)
        for held in (ranks, 2 * ranks)
        for look_ahead in (False, True)
    ]
    return list(dict.fromkeys([*some, SchedulingRules(min(ranks, microbatches), split=False)]))


class _Fixed(NamedTuple):
    """The same actions whatever the cut."""

    schedule: Schedule

    @property
    def effort(self) -> int:
        return sum(map(len, self.schedule.actions))

    def on(self, counts: Counts) -> Schedule:
        return self.schedule


class _Made(NamedTuple):
    """Actions made for the cut's times."""

    costs: Costs
    placement: Placement
    microbatches: int
    rules: SchedulingRules

    @property
    def effort(self) -> int:
        return LIST_COST * (2 + self.rules.split) * self.microbatches * self.placement.stages

    def on(self, counts: Counts) -> Schedule:
        return list_schedule(
            self.placement, self.microbatches, self.costs.times(self.placement, counts), self.rules
        )


def _best(
    costs: Costs, source: _Fixed | _Made, limit: float, starts: list[Counts]
) -> list[ScheduleCandidate]:
    """The fastest cut within the limit, if there is one."""
    if not starts:
        return []
    plans: dict[Counts, ScheduleCandidate] = {}

    def rating(counts: Counts) -> float:
        plans[counts] = candidate_of(costs, source.on(counts), counts)
        # What is over the limit comes after all that is not, the least first, so that the search finds its way back.
        excess = max(plans[counts].memory) / limit - 1
        return plans[counts].seconds if excess <= 0 else 1e9 * (1 + excess)

    found = search_cuts(starts, rating, tries=BUDGET // source.effort if costs.movable else 0)
    plan = plans[min(found, key=lambda counts: found[counts])]
    return [plan] if max(plan.memory) <= limit else []


def candidate_of(costs: Costs, schedule: Schedule, counts: Counts) -> ScheduleCandidate:
    """What a schedule takes on a cut."""
    timeline = simulate(schedule, costs.times(schedule.placement, counts))
    return ScheduleCandidate(
        schedule, counts, timeline.makespan, timeline.bubble, costs.memory(schedule, counts)
    )


def _in_order(plans: list[ScheduleCandidate]) -> list[ScheduleCandidate]:
    """The fastest first, but of those that are equally fast the one that takes the least memory."""
    equal = (1 + EQUAL) * min((plan.seconds for plan in plans), default=0.0)
    return sorted(
        plans,
        key=lambda plan: (
            plan.seconds > equal,
            max(plan.memory) if plan.seconds <= equal else plan.seconds,
        ),
    )


# -- what it costs -----------------------------------------------------------------------------------------------------


class LayerBytes(NamedTuple):
    """Memory of each layer on a rank that holds it, by its place in the model."""

    states: list[float]
    """Weights, gradients, and the rank's share of the optimizer's states."""
    activations: list[float]
    """What one microbatch leaves there from its forward until its backward is done."""


@dataclass(frozen=True)
class MeasuredCosts:
    """Of a model whose layers were measured; memory in bytes."""

    model: CostModel
    layers: LayerBytes
    movable: bool = True

    def first_cuts(self, placement: Placement) -> list[Counts]:
        return even_cuts(self.model, placement.stages)

    def times(self, placement: Placement, counts: Counts) -> Times:
        return MeasuredTimes(
            [],
            [],
            [],
            self.model.measured.message_seconds,
            by_kind=self.model.times(placement, cut_of(counts)),
        )

    def memory(self, schedule: Schedule, counts: Counts) -> list[float]:
        cut = cut_of(counts)
        states, activations = (
            [sum(sizes[layer] for layer in layers) for layers in cut] for sizes in self.layers
        )
        return [
            sum(states[stage] for stage in schedule.placement.stages_of(rank))
            + most_held(schedule, rank, activations)
            for rank in range(schedule.placement.ranks)
        ]


@dataclass(frozen=True)
class EvenCosts:
    """Of a model that is cut evenly, from a microbatch's times on a whole rank; memory in activations of a whole rank."""

    forward: float
    input_gradient: float
    weight_gradient: float
    send: float
    movable: bool = False

    def first_cuts(self, placement: Placement) -> list[Counts]:
        return [(1,) * placement.stages]

    def times(self, placement: Placement, counts: Counts) -> Times:
        return even_times(
            placement,
            forward=self.forward,
            input_gradient=self.input_gradient,
            weight_gradient=self.weight_gradient,
            send=self.send,
        )

    def memory(self, schedule: Schedule, counts: Counts) -> list[float]:
        stages = [1 / schedule.placement.chunks] * schedule.placement.stages
        return [most_held(schedule, rank, stages) for rank in range(schedule.placement.ranks)]


def most_held(schedule: Schedule, rank: int, activations: list[float]) -> float:
    """The most that a rank's activations take at once; `activations` are one microbatch's by stage."""
    stages = schedule.placement.stages_of(rank)
    held = most = 0.0
    for action in schedule.actions[rank]:
        if action.kind == "F":
            held += activations[stages[action.chunk]]
            most = max(most, held)
        elif action.kind in ("B", "W"):
            held -= activations[stages[action.chunk]]
    return most
