"""Advice in words from an x-ray, with predictions that can be tested.

What a step would take with other layers on a stage is simulated: a layer takes its time along, times the speed of the rank
that it goes to; what a stage takes beside its layers stays. A rank is slow, and not its layers, when its fastest block is slow
too: blocks of one model are alike unless something is wrong with one of them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import NamedTuple

from megatrain.pipeline.actions import Kind
from megatrain.pipeline.stages import blocks_per_stage, cut_layers
from megatrain.pipeline.xray import KindTimes, LayerTimes, Measured, XRay, simulated

WORTH_IT = 0.01
"""The least share of a step's time to give advice for."""
NOTABLE = 0.10
"""The share of a step's span from which a part of the waiting is spoken of."""
SLOW = 1.25
"""How many times the median block a slow layer takes."""
SLOW_RANK = 1.15
"""How many times as long as the middle one a slow rank takes."""
BEST_FEW = 8
"""Cuts from which the search goes on."""
BUDGET = 3_000_000
"""Actions to simulate in search of a better cut: some ten seconds."""


class Advice(NamedTuple):
    """A sentence; where it names a setting, its value and the share of the step's time that it is predicted to save."""

    text: str
    layers_per_stage: list[int] | None = None
    gain: float | None = None


def advise(xray: XRay) -> list[Advice]:
    """The most useful first; one sentence at least."""
    found = [*_on_cut(xray), *_on_ranks(xray), *_on_parts(xray)]
    return found or [Advice(f"nothing to mend: no part of the waiting is {NOTABLE:.0%} of the step")]


# -- other cuts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutModel:
    """Seconds of a microbatch for any cut of the layers into stages."""

    measured: Measured
    layers: dict[tuple[Kind, int], float]
    """On a rank of speed 1."""
    beside: KindTimes
    """What a stage takes that is no layer's."""
    slowness: list[float]
    """By rank: how many times as long as the middle one it takes for the same."""

    def makespan(self, cut: list[range]) -> float:
        """Of the whole schedule, with messages."""
        by_kind = {(kind, stage): self._seconds(kind, stage, cut[stage]) for kind, stage in self.beside}
        return simulated(self.measured.schedule, by_kind, send=self.measured.message).makespan

    def _seconds(self, kind: Kind, stage: int, layers: range) -> float:
        slowness = self.slowness[self.measured.placement.place(stage).rank]
        return self.beside[kind, stage] + slowness * sum(self.layers.get((kind, layer), 0.0) for layer in layers)


def cut_model(measured: Measured) -> CutModel:
    """A model whose times for the measured cut are those that were measured."""
    taken = _with_deferred(measured)
    slowness = rank_slowness(measured)
    places = {layer: measured.placement.place(stage).rank for stage, cut in enumerate(measured.cut) for layer in cut}
    beside = {(kind, stage): seconds - sum(taken.get((kind, layer), 0.0) for layer in measured.cut[stage])
              for (kind, stage), seconds in measured.by_kind.items()}  # fmt: skip
    return CutModel(measured, {(kind, layer): seconds / slowness[places[layer]] for (kind, layer), seconds in taken.items()}, beside, slowness)


def _with_deferred(measured: Measured) -> dict[tuple[Kind, int], float]:
    """Layers' times, each W shared out as its I is: a W does its layers' weights together."""
    taken = dict(measured.layers)
    for stage, cut in enumerate(measured.cut):
        whole = sum(taken.get(("I", layer), 0.0) for layer in cut)
        if ("W", stage) in measured.by_kind and whole:
            for layer in cut:
                taken["W", layer] = measured.by_kind["W", stage] * taken.get(("I", layer), 0.0) / whole
    return taken


def rank_slowness(measured: Measured) -> list[float]:
    """By rank, its fastest block beside the middle one of all ranks' fastest; 1 where one block says nothing of the rank."""
    fastest: list[float | None] = []
    for rank in range(measured.placement.ranks):
        blocks = [layer for stage in measured.placement.stages_of(rank) for layer in measured.cut[stage] if 0 < layer < len(measured.titles) - 1]
        times = [_layer_seconds(measured, layer) for layer in blocks]
        fastest.append(min(times) if len(times) > 1 and min(times) > 0 else None)
    known = [seconds for seconds in fastest if seconds is not None]
    middle = statistics.median(known) if known else 1.0
    return [1.0 if seconds is None else seconds / middle for seconds in fastest]


def _layer_seconds(measured: Measured, layer: int) -> float:
    return sum(seconds for (_, place), seconds in measured.layers.items() if place == layer)


def best_cut(model: CutModel) -> list[range]:
    """The fastest cut found, from the measured one and the one that is even by cost: what is near the best few is tried too."""
    measured = model.measured
    costs = [sum(seconds for (_, place), seconds in model.layers.items() if place == layer) for layer in range(len(measured.titles))]
    found: dict[tuple[int, ...], float] = {}

    def try_cut(cut: list[range]) -> None:
        found[tuple(blocks_per_stage(cut))] = model.makespan(cut)

    try_cut(measured.cut)
    try_cut(cut_layers(costs, measured.placement.stages))
    left = BUDGET // sum(map(len, measured.schedule.actions))
    explored: set[tuple[int, ...]] = set()
    while front := [counts for counts in sorted(found, key=lambda counts: found[counts])[:BEST_FEW] if counts not in explored]:
        explored.add(front[0])
        for counts in _neighbours(front[0]):
            if counts not in found and len(found) < left:
                try_cut(cut_of(counts))
    return cut_of(min(found, key=lambda counts: found[counts]))


def _neighbours(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One block fewer on a stage and one more on another, those between hand one on; near ones first."""
    found = []
    for source, target in sorted(permutations(range(len(counts)), 2), key=lambda pair: abs(pair[0] - pair[1])):
        if counts[source] > 1:
            moved = [*counts]
            moved[source] -= 1
            moved[target] += 1
            found.append(tuple(moved))
    return found


def cut_of(counts: tuple[int, ...]) -> list[range]:
    """Ranges of layers from blocks a stage, embedding and head at the ends."""
    bounds = [0, *(1 + sum(counts[:stage]) for stage in range(1, len(counts))), sum(counts) + 2]
    return [range(first, last) for first, last in pairwise(bounds)]


# -- sentences ---------------------------------------------------------------------------------------------------------


def _on_cut(xray: XRay) -> list[Advice]:
    """Whether another cut of the layers is faster."""
    measured = xray.measured
    if len(measured.cut) == 1:
        return []
    model = cut_model(measured)
    cut = best_cut(model)
    gain = (model.makespan(measured.cut) - model.makespan(cut)) / measured.step_seconds
    problem, excess = _slowest_stage(xray)
    if gain >= WORTH_IT:
        counts = blocks_per_stage(cut)
        return [Advice(f"{problem}: {_moves(measured, cut)} → predicted −{gain:.1%} of the step's time; set parallel.layers_per_stage={counts}",
                       counts, gain)]  # fmt: skip
    return [Advice(f"{problem}; no other cut of the blocks would be faster by {WORTH_IT:.0%} or more")] if excess > NOTABLE else []


def _slowest_stage(xray: XRay) -> tuple[str, float]:
    """In words, and as a share above the mean."""
    mean = statistics.fmean(stage.total for stage in xray.stages)
    slowest = max(xray.stages, key=lambda stage: stage.total)
    excess = slowest.total / mean - 1
    words = f"stage {slowest.stage} is {excess:.0%} slower than the mean of the stages"
    slow = [f"{layer.title} alone takes {times:.1f} times the median block" for layer, times in slow_layers(xray) if layer.stage == slowest.stage]
    return words + (f" ({', '.join(slow[:3])})" if slow else ""), excess


def slow_layers(xray: XRay) -> list[tuple[LayerTimes, float]]:
    """Layers that take SLOW times the median block or more on ranks of one speed, and how many times; the slowest first."""
    slowness = rank_slowness(xray.measured)
    seconds = [layer.total / slowness[xray.stages[layer.stage].rank] for layer in xray.layers]
    middle = statistics.median(seconds[1:-1])
    slow = [(layer, taken / middle) for layer, taken in zip(xray.layers, seconds, strict=True) if taken >= SLOW * middle > 0]
    return sorted(slow, key=lambda found: -found[1])


def _moves(measured: Measured, cut: list[range]) -> str:
    """`move block 3 from stage 1 to stage 0, ...`"""
    before = {layer: stage for stage, layers in enumerate(measured.cut) for layer in layers}
    moved: dict[tuple[int, int], list[int]] = {}
    for stage, layers in enumerate(cut):
        for layer in layers:
            if before[layer] != stage:
                moved.setdefault((before[layer], stage), []).append(layer)
    parts = [f"{_named(measured, layers)} from stage {source} to stage {target}" for (source, target), layers in sorted(moved.items())]
    return "move " + ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _named(measured: Measured, layers: list[int]) -> str:
    """`block 3`, `blocks 3 and 4`, `blocks 3–5`."""
    if len(layers) == 1:
        return measured.titles[layers[0]]
    first, last = (measured.titles[layer].removeprefix("block ") for layer in (layers[0], layers[-1]))
    return f"blocks {first} and {last}" if len(layers) == 2 else f"blocks {first}–{last}"


def _on_ranks(xray: XRay) -> list[Advice]:
    found = []
    for rank, slowness in enumerate(rank_slowness(xray.measured)):
        if slowness >= SLOW_RANK:
            found.append(Advice(f"pipeline rank {rank} takes {slowness:.2f} times as long as the others for a block: look at its device, "
                                "its clock rate and what else runs there"))  # fmt: skip
    return found


def _on_parts(xray: XRay) -> list[Advice]:
    """What else is worth looking at, by its share of the ranks' time."""
    total = xray.total
    message = f"a message that is waited for takes {1e3 * xray.measured.message:.2g} ms"
    words = {
        "schedule": "is the schedule's own bubble: more microbatches in a step (a larger train.global_batch_size or a smaller "
        "train.micro_batch_size) or a schedule with less (`megatrain schedule` shows them) would shrink it",
        "microbatches": "goes to microbatches that take longer than others in the same stage: look for other work on these machines",
        "communication": f"goes to messages and to the host between actions; {message}: a larger train.micro_batch_size makes fewer of them",
    }
    shares = sorted(((getattr(total, part) / total.span, text) for part, text in words.items()), reverse=True)
    return [Advice(f"{share:.0%} of the ranks' time {text}") for share, text in shares if share >= NOTABLE]
