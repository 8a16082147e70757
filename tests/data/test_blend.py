"""Mixing sources by weight."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.blend import BLOCK, Blend
from megatrain.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, blocks=st.integers(0, 10**6))
def test_counts_follow_the_weights_and_never_fall(weights, blocks):
    blend = Blend(weights, seed=0)
    now, later = blend.counts(blocks * BLOCK), blend.counts((blocks + 1) * BLOCK)
    assert sum(now) == blocks * BLOCK
    assert all(after >= before for before, after in zip(now, later, strict=True))
    for count, weight in zip(now, weights, strict=True):
        assert abs(count - blocks * BLOCK * weight / sum(weights)) < len(weights) / 2 + 1e-3


def test_each_source_is_read_without_gap_or_repeat():
    weights = [0.7, 0.2, 0.1]
    blend = Blend(weights, seed=3)
    indices = [blend.locate(position) for position in range(3 * BLOCK)]
    for source, count in enumerate(blend.counts(3 * BLOCK)):
        assert sorted(index.position for index in indices if index.source == source) == list(
            range(count)
        )


def test_sources_are_mixed_within_a_block():
    blend = Blend([3, 1], seed=5)
    for first in range(0, BLOCK, 512):
        share = (
            Counter(blend.locate(position).source for position in range(first, first + 512))[1]
            / 512
        )
        assert 0.17 < share < 0.33


def test_location_depends_on_seed_and_position_only():
    forward = [Blend([1, 2], seed=1).locate(position) for position in range(0, 9000, 7)]
    blend = Blend([1, 2], seed=1)
    backward = [blend.locate(position) for position in reversed(range(0, 9000, 7))]
    assert forward == backward[::-1]
    assert forward != [Blend([1, 2], seed=2).locate(position) for position in range(0, 9000, 7)]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_invalid_weight_is_refused(weight):
    with pytest.raises(ConfigError, match="must be a number above 0"):
        Blend([1.0, weight], seed=0)
