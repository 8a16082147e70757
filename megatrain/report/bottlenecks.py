"""Advice from a pipeline profile, with predictions simulated by planner/cost_model.py."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from megatrain.pipeline.partition import blocks_per_stage
from megatrain.planner.cost_model import best_cut, cost_model, rank_slowness
from megatrain.telemetry.bubble_analysis import LayerTimes, PipelineProfile, PipelineTimes
from megatrain.text import join_names

MIN_GAIN = 0.01
"""Least predicted share of a step's time for advice."""
NOTABLE = 0.10
"""Least share of a step's span for which a part of the waiting is reported."""
SLOW_LAYER = 1.25
"""Time of a slow layer as a multiple of the median block."""
SLOW_RANK = 1.15
"""Time of a slow rank as a multiple of the median rank."""

_PART_ADVICE = {
    "schedule": "is the schedule's own bubble. It shrinks with more microbatches per step (larger "
    "train.global_batch_size or smaller train.micro_batch_size) or with another schedule "
    "(`megatrain schedule` shows them, parallel.schedule=auto finds one)",
    "microbatches": "goes to microbatches that take longer than others in the same stage: check "
    "these machines for other work",
    "communication": "goes to messages and to the host between actions. A message that is waited "
    "for takes {message:.2g} ms; a larger train.micro_batch_size gives fewer messages",
}


class Advice(NamedTuple):
    """A sentence, and for some a setting with its predicted gain as a share of the step's time."""

    text: str
    layers_per_stage: list[int] | None = None
    gain: float | None = None


def advise(profile: PipelineProfile) -> list[Advice]:
    """Returns at least one piece of advice, the most useful first."""
    found = [*_advise_on_cut(profile), *_advise_on_ranks(profile), *_advise_on_parts(profile)]
    return found or [Advice(f"no bottleneck: each part of the waiting is below {NOTABLE:.0%}")]


def _advise_on_cut(profile: PipelineProfile) -> list[Advice]:
    """Returns advice if another cut of the layers is faster, or if a stage is notably slow."""
    measured = profile.measured
    if len(measured.cut) == 1:
        return []
    model = cost_model(measured)
    cut = best_cut(model)
    gain = (model.makespan(measured.cut) - model.makespan(cut)) / measured.step_seconds
    problem, excess = _slowest_stage(profile)
    if gain >= MIN_GAIN:
        counts = blocks_per_stage(cut)
        text = (
            f"{problem}: {_moves(measured, cut)} → predicted −{gain:.1%} of the step's time; "
            f"set parallel.layers_per_stage={counts}"
        )
        return [Advice(text, counts, gain)]
    if excess > NOTABLE:
        return [
            Advice(f"{problem}; no other cut of the blocks is faster by {MIN_GAIN:.0%} or more")
        ]
    return []


def _slowest_stage(profile: PipelineProfile) -> tuple[str, float]:
    """Returns a description of the slowest stage and its excess over the mean."""
    mean = statistics.fmean(stage.total for stage in profile.stages)
    slowest = max(profile.stages, key=lambda stage: stage.total)
    excess = slowest.total / mean - 1
    text = f"stage {slowest.stage} is {excess:.0%} slower than the mean of the stages"
    slow = [
        f"{layer.title} alone takes {ratio:.1f} times the median block"
        for layer, ratio in slow_layers(profile)
        if layer.stage == slowest.stage
    ]
    return text + (f" ({', '.join(slow[:3])})" if slow else ""), excess


def slow_layers(profile: PipelineProfile) -> list[tuple[LayerTimes, float]]:
    """Returns slow layers with their multiple of the median block, the slowest first.

    Times are corrected for the speed of the ranks.
    """
    slowness = rank_slowness(profile.measured)
    seconds = [layer.total / slowness[profile.stages[layer.stage].rank] for layer in profile.layers]
    median = statistics.median(seconds[1:-1])
    slow = [
        (layer, value / median)
        for layer, value in zip(profile.layers, seconds, strict=True)
        if value >= SLOW_LAYER * median > 0
    ]
    return sorted(slow, key=lambda found: -found[1])


def _moves(measured: PipelineTimes, cut: list[range]) -> str:
    """Returns `move block 3 from stage 1 to stage 0, ...`."""
    before = {layer: stage for stage, layers in enumerate(measured.cut) for layer in layers}
    moved: dict[tuple[int, int], list[int]] = {}
    for stage, layers in enumerate(cut):
        for layer in layers:
            if before[layer] != stage:
                moved.setdefault((before[layer], stage), []).append(layer)
    parts = [
        f"{_block_names(measured, layers)} from stage {source} to stage {target}"
        for (source, target), layers in sorted(moved.items())
    ]
    return f"move {join_names(parts, limit=4)}"


def _block_names(measured: PipelineTimes, layers: list[int]) -> str:
    """Returns `block 3`, `blocks 3 and 4` or `blocks 3–5`."""
    if len(layers) == 1:
        return measured.titles[layers[0]]
    first, last = (
        measured.titles[layer].removeprefix("block ") for layer in (layers[0], layers[-1])
    )
    return f"blocks {first} and {last}" if len(layers) == 2 else f"blocks {first}–{last}"


def _advise_on_ranks(profile: PipelineProfile) -> list[Advice]:
    return [
        Advice(
            f"pipeline rank {rank} takes {slowness:.2f} times as long as the others for a block: "
            "check its device, its clock rate and other work on it"
        )
        for rank, slowness in enumerate(rank_slowness(profile.measured))
        if slowness >= SLOW_RANK
    ]


def _advise_on_parts(profile: PipelineProfile) -> list[Advice]:
    """Returns advice on each notable part of the waiting, the largest first."""
    total = profile.total
    shares = {part: getattr(total, part) / total.span for part in _PART_ADVICE}
    return [
        Advice(
            f"{shares[part]:.0%} of the ranks' time "
            + _PART_ADVICE[part].format(message=1e3 * profile.measured.message_seconds)
        )
        for part in sorted(shares, key=lambda part: -shares[part])
        if shares[part] >= NOTABLE
    ]
