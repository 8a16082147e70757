"""Predicts the times of other cuts and placements of the layers from a measured one.

The time of a layer scales with the slowness of its rank. The time of an action beside its layers
stays with the rank. A rank counts as slow if even its fastest block is slow, because the blocks of
a model are alike. Both the hints of a profile and `parallel.schedule: auto` use this model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, permutations

from megatrain.pipeline.partition import blocks_per_stage, cut_layers
from megatrain.pipeline.schedule import Kind, Placement, Schedule
from megatrain.telemetry.bubble_analysis import KindTimes, PipelineTimes, simulate_measured

NUM_EXPANDED = 8
"""Best cuts whose neighbours the search tries."""
MAX_ACTIONS = 3_000_000
"""Actions to simulate in the search for a better cut, which takes about ten seconds."""

Counts = tuple[int, ...]
"""Blocks of each stage."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a microbatch for any placement of stages and any cut of the layers.

    Attributes:
        layers: by kind of action and layer, on a rank of slowness 1.
        overhead: time of the measured stages' actions beside their layers.
        slowness: by rank, its time relative to the median rank.
    """

    measured: PipelineTimes
    layers: dict[tuple[Kind, int], float]
    overhead: KindTimes
    slowness: list[float]

    def times(self, placement: Placement, cut: list[range]) -> KindTimes:
        """Returns the seconds of each measured kind of action, by stage."""
        kinds = {kind for kind, _ in self.overhead}
        return {
            (kind, stage): self._seconds(kind, placement, stage, layers)
            for stage, layers in enumerate(cut)
            for kind in kinds
            if placement != self.measured.placement or (kind, stage) in self.overhead
        }

    def makespan(self, cut: list[range], schedule: Schedule | None = None) -> float:
        """Returns the seconds of a schedule with its messages; by default of the measured one."""
        schedule = schedule or self.measured.schedule
        times = self.times(schedule.placement, cut)
        return simulate_measured(schedule, times, send=self.measured.message_seconds).makespan

    def layer_seconds(self, layer: int) -> float:
        """Returns the seconds of a layer's forward and backward."""
        backward = ("B",) if ("B", layer) in self.layers else ("I", "W")
        return sum(self.layers.get((kind, layer), 0.0) for kind in ("F", *backward))  # type: ignore[arg-type]

    def _seconds(self, kind: Kind, placement: Placement, stage: int, layers: range) -> float:
        rank = placement.location(stage).rank
        seconds = sum(self.layers.get((kind, layer), 0.0) for layer in layers)
        return self._overhead(kind, placement, stage, rank) + self.slowness[rank] * seconds

    def _overhead(self, kind: Kind, placement: Placement, stage: int, rank: int) -> float:
        """Returns the measured overhead; in another placement, the mean of the rank's stages."""
        if placement == self.measured.placement:
            return self.overhead[kind, stage]
        known = [
            self.overhead[kind, measured]
            for measured in self.measured.placement.stages_of(rank)
            if (kind, measured) in self.overhead
        ]
        return max(statistics.fmean(known), 0.0) if known else 0.0


def cost_model(measured: PipelineTimes) -> CostModel:
    """Returns a model that predicts the measured times for the measured cut."""
    layers = _with_weight_gradients(measured)
    slowness = rank_slowness(measured)
    ranks = {
        layer: measured.placement.location(stage).rank
        for stage, cut in enumerate(measured.cut)
        for layer in cut
    }
    overhead = {
        (kind, stage): seconds
        - sum(layers.get((kind, layer), 0.0) for layer in measured.cut[stage])
        for (kind, stage), seconds in measured.by_kind.items()
    }
    _add_embedding_backward(layers, overhead)
    normalized = {
        (kind, layer): seconds / slowness[ranks[layer]] for (kind, layer), seconds in layers.items()
    }
    return CostModel(measured, normalized, overhead, slowness)


def _with_weight_gradients(measured: PipelineTimes) -> dict[tuple[Kind, int], float]:
    """Returns the layers' times with each W divided among its layers.

    The shares are the layers' times of B minus I if both were measured, else those of I.
    """
    seconds = dict(measured.layers)
    for stage, cut in enumerate(measured.cut):
        shares = [
            max(seconds["B", layer] - seconds["I", layer], 0.0)
            if {("B", layer), ("I", layer)} <= seconds.keys()
            else 0.0
            for layer in cut
        ]
        if not any(shares):
            shares = [seconds.get(("I", layer), 0.0) for layer in cut]
        total = sum(shares)
        if ("W", stage) in measured.by_kind and total:
            for layer, share in zip(cut, shares, strict=True):
                seconds["W", layer] = measured.by_kind["W", stage] * share / total
    return seconds


def _add_embedding_backward(layers: dict[tuple[Kind, int], float], overhead: KindTimes) -> None:
    """Estimates the embedding's backward, which a trace does not contain.

    It is the overhead of stage 0 beyond the median of the other stages.
    """
    for kind in ("B", "I"):
        others = [
            seconds for (other, stage), seconds in overhead.items() if other == kind and stage > 0
        ]
        if others and (kind, 0) in overhead:
            extra = max(overhead[kind, 0] - statistics.median(others), 0.0)
            overhead[kind, 0] -= extra
            layers[kind, 0] = layers.get((kind, 0), 0.0) + extra


def rank_slowness(measured: PipelineTimes) -> list[float]:
    """Returns each rank's fastest block relative to the median over ranks.

    It is 1 for ranks with a single block, which could itself be slow.
    """
    fastest: list[float | None] = []
    for rank in range(measured.placement.ranks):
        times = [
            sum(seconds for (_, layer), seconds in measured.layers.items() if layer == block)
            for stage in measured.placement.stages_of(rank)
            for block in measured.cut[stage]
            if 0 < block < len(measured.titles) - 1
        ]
        fastest.append(min(times) if len(times) > 1 and min(times) > 0 else None)
    known = [seconds for seconds in fastest if seconds is not None]
    median = statistics.median(known) if known else 1.0
    return [1.0 if seconds is None else seconds / median for seconds in fastest]


# -- other cuts ------------------------------------------------------------------------------------


def best_cut(model: CostModel) -> list[range]:
    """Returns the fastest cut found for the measured schedule.

    The search starts from the measured cut and from the one that is balanced by cost.
    """
    schedule = model.measured.schedule
    measured = tuple(blocks_per_stage(model.measured.cut))
    found = search_cuts(
        [measured, *even_cuts(model, schedule.placement.stages)],
        lambda counts: model.makespan(cut_of(counts)),
        tries=MAX_ACTIONS // sum(map(len, schedule.actions)),
    )
    return cut_of(min(found, key=lambda counts: found[counts]))


def even_cuts(model: CostModel, stages: int) -> list[Counts]:
    """Returns the cut that is balanced by cost; empty if there are fewer blocks than stages."""
    costs = [model.layer_seconds(layer) for layer in range(len(model.measured.titles))]
    if stages > max(len(costs) - 2, 1):
        return []
    return [tuple(blocks_per_stage(cut_layers(costs, stages)))]


def search_cuts(
    starts: list[Counts], seconds: Callable[[Counts], float], *, tries: int
) -> dict[Counts, float]:
    """Returns the seconds of up to `tries` cuts: the starts, and neighbours of the best found."""
    found = {counts: seconds(counts) for counts in starts}
    expanded: set[Counts] = set()
    while front := [
        counts
        for counts in sorted(found, key=lambda counts: found[counts])[:NUM_EXPANDED]
        if counts not in expanded
    ]:
        expanded.add(front[0])
        for counts in _neighbours(front[0]):
            if counts not in found and len(found) < tries:
                found[counts] = seconds(counts)
    return found


def _neighbours(counts: Counts) -> list[Counts]:
    """Returns all cuts with one block moved from a stage to another, the nearest stages first."""
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
    """Returns the layers of each stage, with the embedding first and the head last."""
    bounds = [0, *(1 + sum(counts[:stage]) for stage in range(1, len(counts))), sum(counts) + 2]
    return [range(first, last) for first, last in pairwise(bounds)]
