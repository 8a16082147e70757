"""Mix several sources by weight without remembering what was drawn before.

Positions are cut into blocks of 4096. A block holds a fixed quota of each source, and a keyed permutation of the block
deals them out. With weights 3 : 1 and, for the drawing, blocks of 8:

    slots of the block     A A A A A A | B B          quotas from the counts at the block's two ends
    permuted               A B A A A A B A            position p takes slot perm(p mod 8)
    place within source    A's first 6, B's first 2   counts before the block + rank of the slot

So where a position's sample comes from is a function of (weights, seed, position), in memory for the sources alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import floor, isfinite
from typing import NamedTuple

from megatrain.data.shuffle import Shuffle
from megatrain.errors import ConfigError

BLOCK = 4096


class BlendIndex(NamedTuple):
    """Where a position of the blend is found: which source, and which position within it."""

    source: int
    position: int


class _Block(NamedTuple):
    deal: Shuffle
    slots: list[int]  # first slot of each source
    before: list[int]  # positions each source gave in all earlier blocks


class Blend:
    """A weighted mix of sources: the counts follow the weights to within a few samples at every block's end."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Raise ConfigError for a weight that is not a positive number."""
        for weight in weights:
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or not isfinite(weight)
                or weight <= 0
            ):
                raise ConfigError(
                    "data weight",
                    weight,
                    "must be a number above 0",
                    "leave the source out to use none of it",
                )
        self._weights = [
            Fraction(str(weight)) for weight in weights
        ]  # exact, so that counts never drift
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def counts(self, positions: int) -> list[int]:
        """Return how many of the first `positions` go to each source, at a block's end; never falls as they grow.

        Each source takes its rounded share of what the earlier ones left: the sum is exact, and since what is left
        never falls either, no quota is negative. (Rounding every share by itself gives neither.)
        """
        left, weight_left = positions, sum(self._weights)
        counts = []
        for weight in self._weights:
            count = floor(left * weight / weight_left + Fraction(1, 2))
            counts.append(count)
            left, weight_left = left - count, weight_left - weight
        return counts

    def place(self, position: int) -> BlendIndex:
        """Return which source `position` takes, and which of that source's positions."""
        block = self._block(position // BLOCK)
        slot = block.deal(position % BLOCK)
        source = bisect_right(block.slots, slot) - 1
        return BlendIndex(source, block.before[source] + slot - block.slots[source])

    def _make_block(self, number: int) -> _Block:
        before, after = self.counts(number * BLOCK), self.counts((number + 1) * BLOCK)
        slots = list(accumulate((b - a for a, b in zip(before, after, strict=True)), initial=0))[
            :-1
        ]
        return _Block(Shuffle(BLOCK, key=("blend", self._seed, number)), slots, before)
