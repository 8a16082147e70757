"""Whether the loss spikes: far above what it was just before, for some steps in a row.

"Far" is in robust deviations: 1.4826 times the median distance from the median, which is a standard deviation where losses are normal
and which a few odd ones among them do not move. Seven is also the spike score's of OLMo 2 (arXiv 2501.00656). The loss is one number that
all ranks have added up together, so they all find the same.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from megatrain.checkpoint.train_state import TrainState
from megatrain.config.schema import StabilityConfig

_NORMAL = 1.4826
_LEAST = 0.01
"""Of the median, which a deviation is taken to be at least: losses that hardly vary would make a spike of nothing."""


class SpikeThreshold(NamedTuple):
    """The highest loss that is no spike, and where it comes from."""

    loss: float
    median: float
    deviation: float


def spike_threshold(losses: tuple[float, ...], stability: StabilityConfig) -> SpikeThreshold | None:
    """What the next loss is held to; None while too few are known, and where nobody asks."""
    if stability.on_loss_spike == "off" or len(losses) < stability.spike_window:
        return None
    recent = losses[-stability.spike_window :]
    median = statistics.median(recent)
    deviation = max(
        _NORMAL * statistics.median(abs(loss - median) for loss in recent), _LEAST * abs(median)
    )
    return SpikeThreshold(median + stability.spike_threshold * deviation, median, deviation)


def spike_since(before: TrainState, loss: float, limit: SpikeThreshold | None) -> int:
    """First step of the spike that the next step, with this loss, is in; 0 for none. A loss that is no number begins none and ends none."""
    above = (
        limit is not None and loss > limit.loss if math.isfinite(loss) else before.spike_since > 0
    )
    return (before.spike_since or before.step + 1) if above else 0


def first_to_undo(progress: TrainState, stability: StabilityConfig) -> int:
    """First step of what is to be undone: a spike that has lasted, or as many bad steps as end a run; 0 for nothing."""
    if stability.on_loss_spike != "rollback":
        return 0
    if is_noticed(progress, stability):
        return progress.spike_since
    return (
        progress.step - progress.bad_steps + 1
        if progress.bad_steps >= stability.max_nonfinite_steps
        else 0
    )


def is_noticed(progress: TrainState, stability: StabilityConfig) -> bool:
    """Whether a spike has lasted long enough with the last step, and not before it."""
    return (
        progress.spike_since > 0
        and progress.step - progress.spike_since + 1 == stability.spike_patience
    )


def guards(progress: TrainState, stability: StabilityConfig) -> bool:
    """Whether the next losses are judged here, and a run goes back from where they are bad: wrong weights of a checkpoint show in them too."""
    return (
        stability.on_loss_spike == "rollback"
        and spike_threshold(progress.losses, stability) is not None
    )
