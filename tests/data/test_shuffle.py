"""The keyed permutation is one, at every size, and looks like a shuffle."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.shuffle import Shuffle


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_every_index_is_hit_once(size, seed):
    permutation = Shuffle(size, key=(seed,))
    assert sorted(map(permutation, range(size))) == list(range(size))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2**20, 2**62), seed=st.integers(0, 2**63), first=st.integers(0, 2**20 - 100)
)
def test_large_sizes_stay_in_range_without_doubles(size, seed, first):
    found = [Shuffle(size, key=(seed,))(i) for i in range(first, first + 100)]
    assert len(set(found)) == 100
    assert all(0 <= index < size for index in found)


def test_the_order_is_fixed_for_good():
    # A change here changes the data order of every run that is resumed.
    assert [Shuffle(10, key=("samples", 1234, 0))(i) for i in range(10)] == [
        0,
        6,
        3,
        9,
        7,
        8,
        2,
        1,
        4,
        5,
    ]


def test_keys_give_other_orders():
    orders = {
        tuple(map(Shuffle(100, key=key), range(100)))
        for key in [(1, 0), (1, 1), (2, 0), ("a", 0), (10,)]
    }
    assert len(orders) == 5


def test_each_index_comes_first_about_as_often():
    first = Counter(Shuffle(10, key=(seed,))(0) for seed in range(5000))
    assert all(
        400 < first[index] < 600 for index in range(10)
    )  # 500 expected, standard deviation 21


def test_neighbours_do_not_stay_neighbours():
    permutation = Shuffle(100_000, key=(7,))
    steps = [permutation(i + 1) - permutation(i) for i in range(2000)]
    assert max(Counter(steps).values()) <= 4
    assert sum(step > 0 for step in steps) in range(900, 1100)
