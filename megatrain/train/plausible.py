"""Whether a resumed run goes on where it was: its first losses are held to the last ones before the checkpoint.

A checkpoint can be whole, file by file, and wrong. With wrong weights the first step's loss is that of an untrained model;
wrong moments throw the weights away in the first update, which the next losses show. Both are far above anything the run
had seen just before. An honest batch is not: the rule allows the worst of the recent losses, and above it the larger of a
margin and several of their standard deviations.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

REMEMBERED = 32
"""Losses kept with a checkpoint."""

WATCHED = 3
"""Steps after a resume that are held to the rule: weights show in the first, moments from the second on."""

_DEVIATIONS = 4.0
_FEW = 8
"""With fewer losses than these the margin is doubled: they say little about how much losses vary."""


def remember(losses: tuple[float, ...], loss: float) -> tuple[float, ...]:
    return (*losses, loss)[-REMEMBERED:]


def highest(before: Sequence[float], margin: float) -> float:
    """The highest loss with which the run may go on after `before`, of which there is at least one."""
    spread = statistics.pstdev(before)
    return max(before) + max(margin * (2 if len(before) < _FEW else 1), _DEVIATIONS * spread)
