"""Blending of several sources by weight, without any state.

Positions are cut into blocks of 4096. A block has a fixed quota of each source, and a keyed
permutation of the block mixes them. With weights 3 : 1 and, for the drawing, blocks of 8:

    slots of the block        A A A A A A | B B        quotas: differences of the counts at its ends
    permuted                  A B A A A A B A          position p takes slot shuffle(p mod 8)
    position in the source    A's first 6, B's first 2 count before the block + rank of the slot

The source of a position is a function of (weights, seed, position). Memory is O(sources).
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
    """The source of a position of the blend, and the position in that source."""

    source: int
    position: int


class _Block(NamedTuple):
    shuffle: Shuffle
    first_slots: list[int]  # of each source
    counts_before: list[int]  # positions of each source in all earlier blocks


class Blend:
    """A weighted mix of sources.

    At the end of each block, counts differ from the weights by a few samples at most.

    Args:
        weights: one positive number per source; they need not sum to 1.
        seed: the seed of the permutations.

    Raises:
        ConfigError: a weight is not a positive number.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        for weight in weights:
            _check_weight(weight)
        # Exact fractions: rounding errors of counts must not grow with the position.
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def counts(self, positions: int) -> list[int]:
        """Returns how many of the first `positions`, the end of a block, go to each source.

        Each source takes its rounded share of the positions that the earlier ones left. The sum is
        exact, and counts never fall as `positions` grows. Separate rounding gives neither.
        """
        left, weight_left = positions, sum(self._weights)
        counts = []
        for weight in self._weights:
            count = floor(left * weight / weight_left + Fraction(1, 2))
            counts.append(count)
            left, weight_left = left - count, weight_left - weight
        return counts

    def locate(self, position: int) -> BlendIndex:
        """Returns the source of `position` and the position in it."""
        block = self._block(position // BLOCK)
        slot = block.shuffle(position % BLOCK)
        source = bisect_right(block.first_slots, slot) - 1
        return BlendIndex(source, block.counts_before[source] + slot - block.first_slots[source])

    def _make_block(self, number: int) -> _Block:
        before, after = self.counts(number * BLOCK), self.counts((number + 1) * BLOCK)
        quotas = (b - a for a, b in zip(before, after, strict=True))
        first_slots = list(accumulate(quotas, initial=0))[:-1]
        return _Block(Shuffle(BLOCK, key=("blend", self._seed, number)), first_slots, before)


def _check_weight(weight: object) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and isfinite(weight) and weight > 0):  # type: ignore[arg-type, operator]
        raise ConfigError(
            "data weight", weight, "must be a number above 0", "remove a source that is not used"
        )
