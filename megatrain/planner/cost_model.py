"""What a microbatch would take on other cuts and placements of the layers, from what was measured on one.

A layer takes its time along, times the slowness of the rank that it goes to; what an action takes beside its layers stays with
the rank. A rank is slow, and not its layers, when its fastest block is slow too: blocks of one model are alike unless something
is wrong with one of them. Advice and `parallel.schedule: auto` predict with this one model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, permutations

from megatrain.pipeline.partition import blocks_per_stage, cut_layers
from megatrain.pipeline.schedule import Kind, Placement, Schedule
from megatrain.telemetry.bubble_analysis import KindTimes, PipelineTimes, simulate_measured

BEST_FEW = 8
"""Cuts from which the search goes on."""
BUDGET = 3_000_000
"""Actions to simulate in search of a better cut: some ten seconds."""

Counts = tuple[int, ...]
"""Blocks of each stage."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a microbatch for any placement of stages and any cut of the layers into them."""

    measured: PipelineTimes
    layers: dict[tuple[Kind, int], float]
    """On a rank of slowness 1."""
    beside: KindTimes
    """What an action of the measured stages takes that is no layer's."""
    slowness: list[float]
    """By rank: how many times as long as the middle one it takes for the same."""

    def times(self, placement: Placement, cut: list[range]) -> KindTimes:
        """Seconds of each kind of action that was measured, by stage."""
        kinds = {kind for kind, _ in self.beside}
        return {
            (kind, stage): self._seconds(kind, placement, stage, layers)
            for stage, layers in enumerate(cut)
            for kind in kinds
            if placement != self.measured.placement or (kind, stage) in self.beside
        }

    def makespan(self, cut: list[range], schedule: Schedule | None = None) -> float:
        """Of a whole schedule, the measured one unless given, with messages."""
        schedule = schedule or self.measured.schedule
        return simulate_measured(
            schedule, self.times(schedule.placement, cut), send=self.measured.message_seconds
        ).makespan

    def layer_seconds(self, layer: int) -> float:
        """A layer's forward and backward, whole where it was measured so."""
        backward = ("B",) if ("B", layer) in self.layers else ("I", "W")
        return sum(self.layers.get((kind, layer), 0.0) for kind in ("F", *backward))  # type: ignore[arg-type]

    def _seconds(self, kind: Kind, placement: Placement, stage: int, layers: range) -> float:
        rank = placement.location(stage).rank
        return self._beside(kind, placement, stage, rank) + self.slowness[rank] * sum(
            self.layers.get((kind, layer), 0.0) for layer in layers
        )

    def _beside(self, kind: Kind, placement: Placement, stage: int, rank: int) -> float:
        """The measured stage's own; in another placement, the mean of what the rank's measured stages have."""
        if placement == self.measured.placement:
            return self.beside[kind, stage]
        known = [
            self.beside[kind, its]
            for its in self.measured.placement.stages_of(rank)
            if (kind, its) in self.beside
        ]
        return max(statistics.fmean(known), 0.0) if known else 0.0


def cost_model(measured: PipelineTimes) -> CostModel:
    """A model whose times for the measured cut are those that were measured."""
    taken = _with_deferred(measured)
    slowness = rank_slowness(measured)
    places = {
        layer: measured.placement.location(stage).rank
        for stage, cut in enumerate(measured.cut)
        for layer in cut
    }
    beside = {
        (kind, stage): seconds - sum(taken.get((kind, layer), 0.0) for layer in measured.cut[stage])
        for (kind, stage), seconds in measured.by_kind.items()
    }
    _give_to_embedding(taken, beside)
    return CostModel(
        measured,
        {
            (kind, layer): seconds / slowness[places[layer]]
            for (kind, layer), seconds in taken.items()
        },
        beside,
        slowness,
    )


def _with_deferred(measured: PipelineTimes) -> dict[tuple[Kind, int], float]:
    """Layers' times, each W shared out: a W does its layers' weights together.

    By what a layer's whole backward takes beyond its I where both were measured, else as the layers' I are.
    """
    taken = dict(measured.layers)
    for stage, cut in enumerate(measured.cut):
        shares = [
            max(taken["B", layer] - taken["I", layer], 0.0)
            if {("B", layer), ("I", layer)} <= taken.keys()
            else 0.0
            for layer in cut
        ]
        if not any(shares):
            shares = [taken.get(("I", layer), 0.0) for layer in cut]
        whole = sum(shares)
        if ("W", stage) in measured.by_kind and whole:
            for layer, share in zip(cut, shares, strict=True):
                taken["W", layer] = measured.by_kind["W", stage] * share / whole
    return taken


def _give_to_embedding(taken: dict[tuple[Kind, int], float], beside: KindTimes) -> None:
    """An embedding's backward leaves no mark: what stage 0 takes beside its layers more than other stages do is its."""
    for kind in ("B", "I"):
        others = [
            seconds for (other, stage), seconds in beside.items() if other == kind and stage > 0
        ]
        if others and (kind, 0) in beside:
            more = max(beside[kind, 0] - statistics.median(others), 0.0)
            beside[kind, 0] -= more
            taken[kind, 0] = taken.get((kind, 0), 0.0) + more


def rank_slowness(measured: PipelineTimes) -> list[float]:
    """By rank, its fastest block beside the middle one of all ranks' fastest; 1 where one block says nothing of the rank."""
    fastest: list[float | None] = []
    for rank in range(measured.placement.ranks):
        blocks = [
            layer
            for stage in measured.placement.stages_of(rank)
            for layer in measured.cut[stage]
            if 0 < layer < len(measured.titles) - 1
        ]
        times = [_layer_seconds(measured, layer) for layer in blocks]
        fastest.append(min(times) if len(times) > 1 and min(times) > 0 else None)
    known = [seconds for seconds in fastest if seconds is not None]
    middle = statistics.median(known) if known else 1.0
    return [1.0 if seconds is None else seconds / middle for seconds in fastest]


def _layer_seconds(measured: PipelineTimes, layer: int) -> float:
    return sum(seconds for (_, place), seconds in measured.layers.items() if place == layer)


# -- other cuts --------------------------------------------------------------------------------------------------------


def best_cut(model: CostModel) -> list[range]:
    """The fastest cut found for the measured schedule, from the measured one and the one that is even by cost."""
    schedule = model.measured.schedule
    starts = [
        tuple(blocks_per_stage(model.measured.cut)),
        *even_cuts(model, schedule.placement.stages),
    ]
    found = search_cuts(
        starts,
        lambda counts: model.makespan(cut_of(counts)),
        tries=BUDGET // sum(map(len, schedule.actions)),
    )
    return cut_of(min(found, key=lambda counts: found[counts]))


def even_cuts(model: CostModel, stages: int) -> list[Counts]:
    """The cut into so many stages that is even by cost; none where there are too few blocks."""
    costs = [model.layer_seconds(layer) for layer in range(len(model.measured.titles))]
    return (
        [tuple(blocks_per_stage(cut_layers(costs, stages)))]
        if stages <= max(len(costs) - 2, 1)
        else []
    )


def search_cuts(
    starts: list[Counts], seconds: Callable[[Counts], float], *, tries: int
) -> dict[Counts, float]:
    """What cuts take, found from `starts` on: what is near the best few is tried too, `tries` cuts at most."""
    found = {counts: seconds(counts) for counts in starts}
    explored: set[Counts] = set()
    while front := [
        counts
        for counts in sorted(found, key=lambda counts: found[counts])[:BEST_FEW]
        if counts not in explored
    ]:
        explored.add(front[0])
        for counts in _neighbours(front[0]):
            if counts not in found and len(found) < tries:
                found[counts] = seconds(counts)
    return found


def _neighbours(counts: Counts) -> list[Counts]:
    """One block fewer on a stage and one more on another, those between hand one on; near ones first."""
    found = []
    for source, target in sorted(
        permutations(range(len(counts)), 2), key=lambda pair: abs(pair[0] - pair[1])
    ):
        if counts[source] > 1:
            moved = [*counts]
            moved[source] -= 1
            moved[target] += 1
            found.append(tuple(moved))
    return found


def cut_of(counts: Counts) -> list[range]:
    """Ranges of layers from blocks a stage, embedding and head at the ends."""
    bounds = [0, *(1 + sum(counts[:stage]) for stage in range(1, len(counts))), sum(counts) + 2]
    return [range(first, last) for first, last in pairwise(bounds)]
