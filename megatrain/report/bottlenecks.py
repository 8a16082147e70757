"""Advice in words from a profile, with predictions that can be tested: what a step would take is simulated (costs.py)."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from megatrain.pipeline.partition import blocks_per_stage
from megatrain.planner.cost_model import best_cut, cost_model, rank_slowness
from megatrain.telemetry.bubble_analysis import LayerTimes, PipelineProfile, PipelineTimes

WORTH_IT = 0.01
"""The least share of a step's time to give advice for."""
NOTABLE = 0.10
"""The share of a step's span from which a part of the waiting is spoken of."""
SLOW = 1.25
"""How many times the median block a slow layer takes."""
SLOW_RANK = 1.15
"""How many times as long as the middle one a slow rank takes."""


class Advice(NamedTuple):
    """A sentence; where it names a setting, its value and the share of the step's time that it is predicted to save."""

    text: str
    layers_per_stage: list[int] | None = None
    gain: float | None = None


def advise(profile: PipelineProfile) -> list[Advice]:
    """The most useful first; one sentence at least."""
    found = [*_on_cut(profile), *_on_ranks(profile), *_on_parts(profile)]
    return found or [
        Advice(f"nothing to mend: no part of the waiting is {NOTABLE:.0%} of the step")
    ]


# -- sentences ---------------------------------------------------------------------------------------------------------


def _on_cut(profile: PipelineProfile) -> list[Advice]:
    """Whether another cut of the layers is faster."""
    measured = profile.measured
    if len(measured.cut) == 1:
        return []
    model = cost_model(measured)
    cut = best_cut(model)
    gain = (model.makespan(measured.cut) - model.makespan(cut)) / measured.step_seconds
    problem, excess = _slowest_stage(profile)
    if gain >= WORTH_IT:
        counts = blocks_per_stage(cut)
        return [
            Advice(
                f"{problem}: {_moves(measured, cut)} → predicted −{gain:.1%} of the step's time; set parallel.layers_per_stage={counts}",
                counts,
                gain,
            )
        ]
    return (
        [Advice(f"{problem}; no other cut of the blocks would be faster by {WORTH_IT:.0%} or more")]
        if excess > NOTABLE
        else []
    )


def _slowest_stage(profile: PipelineProfile) -> tuple[str, float]:
    """In words, and as a share above the mean."""
    mean = statistics.fmean(stage.total for stage in profile.stages)
    slowest = max(profile.stages, key=lambda stage: stage.total)
    excess = slowest.total / mean - 1
    words = f"stage {slowest.stage} is {excess:.0%} slower than the mean of the stages"
    slow = [
        f"{layer.title} alone takes {times:.1f} times the median block"
        for layer, times in slow_layers(profile)
        if layer.stage == slowest.stage
    ]
    return words + (f" ({', '.join(slow[:3])})" if slow else ""), excess


def slow_layers(profile: PipelineProfile) -> list[tuple[LayerTimes, float]]:
    """Layers that take SLOW times the median block or more on ranks of one speed, and how many times; the slowest first."""
    slowness = rank_slowness(profile.measured)
    seconds = [layer.total / slowness[profile.stages[layer.stage].rank] for layer in profile.layers]
    middle = statistics.median(seconds[1:-1])
    slow = [
        (layer, taken / middle)
        for layer, taken in zip(profile.layers, seconds, strict=True)
        if taken >= SLOW * middle > 0
    ]
    return sorted(slow, key=lambda found: -found[1])


def _moves(measured: PipelineTimes, cut: list[range]) -> str:
    """`move block 3 from stage 1 to stage 0, ...`"""
    before = {layer: stage for stage, layers in enumerate(measured.cut) for layer in layers}
    moved: dict[tuple[int, int], list[int]] = {}
    for stage, layers in enumerate(cut):
        for layer in layers:
            if before[layer] != stage:
                moved.setdefault((before[layer], stage), []).append(layer)
    parts = [
        f"{_named(measured, layers)} from stage {source} to stage {target}"
        for (source, target), layers in sorted(moved.items())
    ]
    return (
        "move " + ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
    )


def _named(measured: PipelineTimes, layers: list[int]) -> str:
    """`block 3`, `blocks 3 and 4`, `blocks 3–5`."""
    if len(layers) == 1:
        return measured.titles[layers[0]]
    first, last = (
        measured.titles[layer].removeprefix("block ") for layer in (layers[0], layers[-1])
    )
    return f"blocks {first} and {last}" if len(layers) == 2 else f"blocks {first}–{last}"


def _on_ranks(profile: PipelineProfile) -> list[Advice]:
    found = []
    for rank, slowness in enumerate(rank_slowness(profile.measured)):
        if slowness >= SLOW_RANK:
            found.append(
                Advice(
                    f"pipeline rank {rank} takes {slowness:.2f} times as long as the others for a block: look at its device, "
                    "its clock rate and what else runs there"
                )
            )
    return found


def _on_parts(profile: PipelineProfile) -> list[Advice]:
    """What else is worth looking at, by its share of the ranks' time."""
    total = profile.total
    message = f"a message that is waited for takes {1e3 * profile.measured.message_seconds:.2g} ms"
    words = {
        "schedule": "is the schedule's own bubble: more microbatches in a step (a larger train.global_batch_size or a smaller "
        "train.micro_batch_size) or a schedule with less (`megatrain schedule` shows them, parallel.schedule=auto finds one) would shrink it",
        "microbatches": "goes to microbatches that take longer than others in the same stage: look for other work on these machines",
        "communication": f"goes to messages and to the host between actions; {message}: a larger train.micro_batch_size makes fewer of them",
    }
    shares = sorted(
        ((getattr(total, part) / total.span, text) for part, text in words.items()), reverse=True
    )
    return [
        Advice(f"{share:.0%} of the ranks' time {text}")
        for share, text in shares
        if share >= NOTABLE
    ]
