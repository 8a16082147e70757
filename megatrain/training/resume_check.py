"""Whether a resumed run goes on where it was: its first losses are held to the last ones before the checkpoint.

A checkpoint can be whole, file by file, and wrong. With wrong weights the first step's loss is that of an untrained model;
wrong moments throw the weights away in the first update, which the next losses show. Both are far above anything the run
had seen just before. An honest batch is not: the rule allows the worst of the recent losses, and above it the larger of a
margin and several of their standard deviations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatrain.checkpoint.train_state import TrainState
from megatrain.errors import CheckpointError

REMEMBERED = 32
"""Losses that a resume is held to, and that a checkpoint keeps at least."""

WATCHED = 3
"""Steps after a resume that are held to the rule: weights show in the first, moments from the second on."""

_DEVIATIONS = 4.0
_FEW = 8
"""With fewer losses than these the margin is doubled: they say little about how much losses vary."""


def remember_loss(
    losses: tuple[float, ...], loss: float, *, at_least: int = 0
) -> tuple[float, ...]:
    """The last losses, with one more; none is added that is no number. `at_least` as many are kept as whoever else judges by them needs."""
    return (*losses, loss)[-max(REMEMBERED, at_least) :] if math.isfinite(loss) else losses


def highest_loss(before: Sequence[float], margin: float) -> float:
    """The highest loss with which the run may go on after `before`, of which there is at least one."""
    before = before[-REMEMBERED:]
    spread = statistics.pstdev(before)
    return max(before) + max(margin * (2 if len(before) < _FEW else 1), _DEVIATIONS * spread)


class ResumeCheck:
    """The first steps after a resume from `path`, or of a run that begins afresh, which is held to nothing."""

    def __init__(self, path: Path | None, before: TrainState, *, margin: float) -> None:
        self._path, self._before, self._margin = path, before, margin

    def check(self, step: int, loss: float) -> None:
        """Refuse to go on from a checkpoint whose first losses are far above those before it."""
        before = self._before
        if (
            self._path is None
            or not before.losses
            or not self._margin
            or step > before.step + WATCHED
        ):
            return
        most = highest_loss(before.losses, self._margin)
        if loss > most:
            raise CheckpointError(
                f"{self._path} is not to be trusted: step {step} has a loss of {loss:.3f}, after {before.losses[-1]:.3f} at step {before.step}, and at "
                f"most {most:.3f} was to be expected (checkpoint.resume_loss_tolerance={self._margin:g}). Take an older one with checkpoint.resume=FOLDER, or set "
                "checkpoint.resume_loss_tolerance=0 where other data explain it"
            )

    def has_seen_an_update(self, step: int) -> bool:
        """Whether a loss has shown what the first update after the resume did: before that nothing older may go."""
        return self._path is None or step > self._before.step + 1
