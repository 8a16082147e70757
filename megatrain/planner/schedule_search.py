"""Searches the fastest schedule, placement and cut of the layers for `parallel.schedule: auto`.

Candidates are the named schedules and schedules built for the measured times (list_scheduler.py),
each with the cuts near its best ones. Among candidates within one percent of the fastest, the one
with the least memory wins.
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

EQUAL_TIME = 0.01
"""Relative difference up to which candidates count as equally fast."""
MAX_ACTIONS = 50_000
"""Actions to simulate per schedule in the search for its best cut, which takes half a second."""
LIST_COST = 8
"""Time to build a list schedule, relative to its simulation."""
MAX_CHUNKS = 4
"""Virtual stages per rank of interleaved schedules."""


@dataclass(frozen=True)
class ScheduleCandidate:
    """A schedule on a cut of the layers, with its predicted time and memory.

    Attributes:
        counts: blocks of each stage.
        seconds: from the first action's start to the last one's end.
        waiting: the share of the ranks' time in bubbles.
        memory: peak memory of each rank, in the unit of the limit.
    """

    schedule: Schedule
    counts: Counts
    seconds: float
    waiting: float
    memory: list[float]


class Costs(Protocol):
    """Times and memory of a model on any placement and cut."""

    @property
    def movable(self) -> bool:
        """True if the search may change the first cuts."""

    def first_cuts(self, placement: Placement) -> list[Counts]:
        """Returns cuts to start from; empty if there are fewer blocks than stages."""

    def times(self, placement: Placement, counts: Counts) -> Times: ...

    def memory(self, schedule: Schedule, counts: Counts) -> list[float]:
        """Returns the peak memory of each rank."""


# -- the search ------------------------------------------------------------------------------------


def find_candidates(
    costs: Costs, *, ranks: int, microbatches: int, limit: float = math.inf
) -> list[ScheduleCandidate]:
    """Returns the best candidate of each kind within the memory limit, the best of all first."""
    candidates: list[ScheduleCandidate] = []
    for schedule in _named_schedules(ranks, microbatches):
        candidates += _best(
            costs, _FixedActions(schedule), limit, costs.first_cuts(schedule.placement)
        )
    for placement in (Placement(ranks), Placement(ranks, 2, "v"), Placement(ranks, 2)):
        cuts = {
            candidate.counts
            for candidate in candidates
            if candidate.schedule.placement == placement
        }
        for rules in _rules(ranks, microbatches):
            candidates += _best(
                costs,
                _ListScheduler(costs, placement, microbatches, rules),
                limit,
                [*cuts, *costs.first_cuts(placement)],
            )
    return _sorted(candidates)


def _named_schedules(ranks: int, microbatches: int) -> Iterator[Schedule]:
    """Yields all schedules but gpipe, which has the bubble of 1f1b and more activations."""
    for name, family in SCHEDULES.items():
        if name == "gpipe" or microbatches < family.min_microbatches(ranks):
            continue
        for chunks in range(2, MAX_CHUNKS + 1) if family.any_chunks else [family.chunks]:
            yield build_schedule(name, ranks, microbatches, chunks)


def _rules(ranks: int, microbatches: int) -> list[SchedulingRules]:
    """Returns rules for as many microbatches as 1f1b's first rank holds, and for twice as many."""
    rules = [
        SchedulingRules(min(count, microbatches), look_ahead=look_ahead)
        for count in (ranks, 2 * ranks)
        for look_ahead in (False, True)
    ]
    return list(dict.fromkeys([*rules, SchedulingRules(min(ranks, microbatches), split=False)]))


class _FixedActions(NamedTuple):
    """A schedule whose actions do not depend on the cut."""

    schedule: Schedule

    @property
    def num_simulated(self) -> int:
        """Cost of one try, in simulated actions."""
        return sum(map(len, self.schedule.actions))

    def for_cut(self, counts: Counts) -> Schedule:
        return self.schedule


class _ListScheduler(NamedTuple):
    """Builds a schedule for the times of each cut."""

    costs: Costs
    placement: Placement
    microbatches: int
    rules: SchedulingRules

    @property
    def num_simulated(self) -> int:
        """Cost of one try, in simulated actions."""
        return LIST_COST * (2 + self.rules.split) * self.microbatches * self.placement.stages

    def for_cut(self, counts: Counts) -> Schedule:
        return list_schedule(
            self.placement, self.microbatches, self.costs.times(self.placement, counts), self.rules
        )


def _best(
    costs: Costs, source: _FixedActions | _ListScheduler, limit: float, starts: list[Counts]
) -> list[ScheduleCandidate]:
    """Returns the fastest cut within the limit, if there is one."""
    if not starts:
        return []
    candidates: dict[Counts, ScheduleCandidate] = {}

    def rating(counts: Counts) -> float:
        candidates[counts] = candidate_of(costs, source.for_cut(counts), counts)
        # Cuts over the limit rank after all others, by excess, so that the search can leave them.
        excess = max(candidates[counts].memory) / limit - 1
        return candidates[counts].seconds if excess <= 0 else 1e9 * (1 + excess)

    found = search_cuts(
        starts, rating, tries=MAX_ACTIONS // source.num_simulated if costs.movable else 0
    )
    candidate = candidates[min(found, key=lambda counts: found[counts])]
    return [candidate] if max(candidate.memory) <= limit else []


def candidate_of(costs: Costs, schedule: Schedule, counts: Counts) -> ScheduleCandidate:
    """Returns the predicted time and memory of a schedule on a cut."""
    timeline = simulate(schedule, costs.times(schedule.placement, counts))
    return ScheduleCandidate(
        schedule, counts, timeline.makespan, timeline.bubble, costs.memory(schedule, counts)
    )


def _sorted(candidates: list[ScheduleCandidate]) -> list[ScheduleCandidate]:
    """Sorts by time; candidates as fast as the fastest come first, sorted by memory."""
    equal = (1 + EQUAL_TIME) * min((candidate.seconds for candidate in candidates), default=0.0)
    return sorted(
        candidates,
        key=lambda candidate: (
            candidate.seconds > equal,
            max(candidate.memory) if candidate.seconds <= equal else candidate.seconds,
        ),
    )


# -- costs -----------------------------------------------------------------------------------------


class LayerBytes(NamedTuple):
    """Bytes of each layer of the model on its rank.

    Attributes:
        states: weights, gradients, and the rank's share of the optimizer state.
        activations: of one microbatch, from its forward until its backward is done.
    """

    states: list[float]
    activations: list[float]


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs of a model whose layers were measured; memory in bytes."""

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
            + peak_memory(schedule, rank, activations)
            for rank in range(schedule.placement.ranks)
        ]


@dataclass(frozen=True)
class EvenCosts:
    """Costs of a model that is cut evenly.

    Times are those of a microbatch on all layers of a rank. The unit of memory is the activations
    of a microbatch on all layers of a rank.
    """

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
        return [peak_memory(schedule, rank, stages) for rank in range(schedule.placement.ranks)]


def peak_memory(schedule: Schedule, rank: int, activations: list[float]) -> float:
    """Returns the peak memory of a rank's activations, given one microbatch's by stage."""
    stages = schedule.placement.stages_of(rank)
    memory = peak = 0.0
    for action in schedule.actions[rank]:
        if action.kind == "F":
            memory += activations[stages[action.chunk]]
            peak = max(peak, memory)
        elif action.kind in ("B", "W"):
            memory -= activations[stages[action.chunk]]
    return peak
