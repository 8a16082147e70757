"""Finds the blocking ranks from the states of all ranks."""

import pytest

from megatrain.launch.diagnosis import RankState, compact, find_blocking_ranks

WORLD = range(4)


def states(**ranks):
    """Returns states from r0=(activity, waits_for[, step]), ...; the default step is 7."""
    return {
        int(name[1:]): RankState(rest[0] if rest else 7, activity, compact(waits), 60.0)
        for name, (activity, waits, *rest) in ranks.items()
    }


CASES = {
    "the end of a chain of receives": (
        states(
            r0=("recv B2 from rank 1", (1,)),
            r1=("recv B2 from rank 2", (2,)),
            r2=("all-reduce data (F0)", (2, 3)),
            r3=("loading data", ()),
        ),
        [3],
    ),
    "the rank that is not in the collective": (
        states(
            r0=("all-reduce world (F3)", WORLD),
            r1=("all-reduce world (B3)", WORLD),
            r2=("saving", ()),
            r3=("all-reduce world (F3)", WORLD),
        ),
        [2],
    ),
    "the rank that a second collective waits for": (
        states(
            r0=("all-reduce world (x)", WORLD),
            r1=("all-reduce world (x)", WORLD),
            r2=("all-reduce tensor (F1)", (2, 3)),
            r3=("F0", ()),
        ),
        [3],
    ),
    "the rank that is a step behind in a collective of the same name": (
        states(
            r0=("all-reduce world (x)", WORLD),
            r1=("all-reduce world (x)", WORLD),
            r2=("recv F0 from rank 3", (3,), 6),
            r3=("F0", (), 6),
        ),
        [3],
    ),
    "a working rank, before a complete collective": (
        states(
            r0=("all-reduce data (x)", (0, 1)),
            r1=("all-reduce data (x)", (0, 1)),
            r2=("recv F0 from rank 3", (3,)),
            r3=("F0", ()),
        ),
        [3],
    ),
    "all ranks of a complete collective that does not end": (
        {rank: RankState(7, "all-reduce world (F3)", WORLD, 60.0) for rank in WORLD},
        [0, 1, 2, 3],
    ),
    "the rank that most wait for": (
        states(
            r0=("recv F0 from rank 1", (1,)),
            r1=("F0", ()),
            r2=("W1", ()),
            r3=("recv F0 from rank 1", (1,)),
        ),
        [1],
    ),
    "none in a cycle": (
        states(
            r0=("recv F0 from rank 1", (1,)),
            r1=("recv B0 from rank 0", (0,)),
            r2=("recv F0 from rank 1", (1,)),
            r3=("recv F0 from rank 1", (1,)),
        ),
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocking_ranks(case):
    given, expected = CASES[case]
    assert find_blocking_ranks(given, []) == expected
    assert (
        find_blocking_ranks(
            {rank: RankState.from_json(state.to_json()) for rank, state in given.items()}, []
        )
        == expected
    )


def test_silent_ranks_block():
    given, _ = CASES["the end of a chain of receives"]
    assert find_blocking_ranks(given, {5, 4}) == [4, 5]


def test_thousands_of_ranks():
    """4096 ranks wait for one, each naming all others; comparing pairs would take minutes."""
    world = range(4096)
    given = {
        rank: RankState(7, "all-reduce world (x)", compact(tuple(world)), 60.0)
        for rank in world
        if rank != 77
    }
    given[77] = RankState(7, "loading data", (), 60.0)
    assert find_blocking_ranks(given, []) == [77]
    assert all(len(str(state.to_json())) < 200 for state in given.values())
