"""Best-fit decreasing: its drawing, its properties and how full it makes sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.packing import one_per_sequence, pack


def contents(lengths, sequences):
    """Returns the lengths in each sequence."""
    return [
        [int(lengths[i]) for i in sequences.order[a:b]]
        for a, b in zip(sequences.starts[:-1], sequences.starts[1:], strict=True)
    ]


def test_example_of_the_docstring():
    lengths = np.array([5, 3, 7, 2, 1])
    assert contents(lengths, pack(lengths, capacity=8, seed=0)) == [[7, 1], [5, 3], [2]]


def plain_best_fit(lengths, capacity):
    """Returns the space left by the plain rule: longest first, into the fullest that takes it."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in spaces if left >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 3))
def test_packing_has_every_sample_once_and_follows_the_rule(lengths, seed):
    lengths = np.array(lengths, dtype=np.int64)
    packed = pack(lengths, capacity=20, seed=seed)
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))
    sums = [sum(some) for some in contents(lengths, packed)]
    assert sorted(20 - total for total in sums) == plain_best_fit(lengths.tolist(), 20)
    assert all(total <= 20 for total in sums)


def test_a_function_of_the_seed():
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    one, same, other = (pack(lengths, capacity=64, seed=seed) for seed in (1, 1, 2))
    assert one.order.tolist() == same.order.tolist()
    assert one.order.tolist() != other.order.tolist()


def test_a_realistic_mix_fills_97_percent():
    """Lengths of instruction data are about log-normal, truncated to the sequence length."""
    for median, spread in ((300, 0.8), (120, 1.0), (700, 1.1)):
        lengths = (
            np.random.default_rng(7)
            .lognormal(np.log(median), spread, 20_000)
            .astype(np.int64)
            .clip(8, 2048)
        )
        packed = pack(lengths, capacity=2048, seed=0)
        fill = lengths.sum() / ((len(packed.starts) - 1) * 2048)
        assert fill >= 0.97, (median, spread, fill)
        assert lengths.sum() / (len(one_per_sequence(20_000).starts) - 1) / 2048 < 0.6, (
            "packing must be useful"
        )
