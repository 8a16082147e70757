"""A check of the first losses after a resume against the last ones before it.

Every file of a checkpoint can be intact and its content wrong. Wrong weights give the first step
the loss of an untrained model. Wrong moments destroy the weights in the first update, which the
next losses show. Both losses are far above any recent one. The limit allows the highest recent
loss, plus the larger of a tolerance and several standard deviations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.checkpoint.train_state import TrainState
from megatrain.errors import CheckpointError
from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer

RECENT_LOSSES = 32
"""Losses that the limit is computed from, and the fewest that a checkpoint keeps."""

CHECKED_STEPS = 3
"""Checked steps after a resume: wrong weights show in the first, wrong moments in the next."""

_DEVIATIONS = 4.0
_FEW_LOSSES = 8
"""Below this number of losses their spread is uncertain, and the tolerance is doubled."""


def append_loss(losses: tuple[float, ...], loss: float, *, keep: int = 0) -> tuple[float, ...]:
    """Returns the recent losses with one more, unless it is not finite.

    Args:
        keep: the number of losses to keep, if it is more than `RECENT_LOSSES`.
    """
    return (*losses, loss)[-max(RECENT_LOSSES, keep) :] if math.isfinite(loss) else losses


def highest_loss(losses: Sequence[float], tolerance: float) -> float:
    """Returns the highest plausible loss after `losses`, of which there is at least one."""
    losses = losses[-RECENT_LOSSES:]
    if len(losses) < _FEW_LOSSES:
        tolerance *= 2
    return max(losses) + max(tolerance, _DEVIATIONS * statistics.pstdev(losses))


class ResumeCheck(Callback):
    """Raises if one of the first losses after a resume from `path` is above `highest_loss`."""

    def __init__(self, path: Path, resumed: TrainState, *, tolerance: float) -> None:
        self._path, self._resumed, self._tolerance = path, resumed, tolerance

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Checks the loss of a step."""
        self.check(trainer.state.step, report.loss)

    def on_rollback(self, trainer: Trainer, undone: TrainState) -> None:
        """Ends the check, because later losses follow from another checkpoint."""
        self._tolerance = 0.0

    def check(self, step: int, loss: float) -> None:
        """Raises CheckpointError if `loss` is implausible."""
        resumed = self._resumed
        if not self._tolerance or not resumed.losses or step > resumed.step + CHECKED_STEPS:
            return
        limit = highest_loss(resumed.losses, self._tolerance)
        if loss > limit:
            raise CheckpointError(
                f"{self._path} gives an implausible loss: {loss:.3f} at step {step}, after "
                f"{resumed.losses[-1]:.3f} at step {resumed.step}; the limit is {limit:.3f} "
                f"(checkpoint.resume_loss_tolerance={self._tolerance:g}). Resume from an older "
                "checkpoint with checkpoint.resume=FOLDER, or set "
                "checkpoint.resume_loss_tolerance=0 if the data have changed",
                fix={"checkpoint.resume_loss_tolerance": 0},
            )
