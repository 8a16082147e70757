"""The state of fp16's dynamic loss scale."""

from __future__ import annotations

from typing import NamedTuple


class LossScale(NamedTuple):
    """The state of the search for the largest loss scale without overflow.

    Attributes:
        scale: the current scale.
        patience: overflows left until the scale is lowered.
        last_overflow: the step of the last overflow.
        steps: steps so far.
    """

    scale: float
    patience: int
    last_overflow: int
    steps: int
