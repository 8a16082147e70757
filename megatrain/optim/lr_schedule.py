"""The learning rate as a function of the step, without state."""

from __future__ import annotations

import math

from megatrain.config.schema import LrScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: LrScheduleConfig, steps: int) -> float:
    """Returns the learning rate of step `step`, counted from 1.

    Warm-up is linear from 0 and reaches `peak` at `warmup_steps`. Then the rate follows the
    schedule's name: cosine (SGDR, arXiv 1608.03983, one cycle), linear, constant, wsd (warm-up,
    stable, linear decay; MiniCPM, arXiv 2404.06395), or inverse_sqrt (Transformer, arXiv
    1706.03762, scaled to meet the peak).
    """
    warmup, end = schedule.warmup_steps, schedule.decay_steps or steps
    if step <= warmup:
        return peak * step / max(warmup, 1)
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return max(schedule.min_lr, peak * math.sqrt(max(warmup, 1) / step))
    done = min(1.0, (step - warmup) / max(end - warmup, 1))
    if schedule.name == "wsd":
        if done <= schedule.stable_fraction:
            return peak
        done = (done - schedule.stable_fraction) / (1 - schedule.stable_fraction)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.min_lr + (peak - schedule.min_lr) * left
