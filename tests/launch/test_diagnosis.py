"""Whom everyone waits for, from what each rank says it is in."""

import pytest

from megatrain.launch.diagnosis import ProcessState, compact, find_blocking_rank

WORLD = range(4)


def states(**ranks):
    """r0=(words, waits_for) ...: all in step 7, unless a third item says another."""
    return {
        int(name[1:]): ProcessState(rest[0] if rest else 7, words, compact(waits), 60.0)
        for name, (words, waits, *rest) in ranks.items()
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
    "who is not in the collective that the others are in": (
        states(
            r0=("all-reduce world (F3)", WORLD),
            r1=("all-reduce world (B3)", WORLD),
            r2=("saving", ()),
            r3=("all-reduce world (F3)", WORLD),
        ),
        [2],
    ),
    "who is in another collective, which waits for somebody else": (
        states(
            r0=("all-reduce world (x)", WORLD),
            r1=("all-reduce world (x)", WORLD),
            r2=("all-reduce tensor (F1)", (2, 3)),
            r3=("F0", ()),
        ),
        [3],
    ),
    "who is a step behind in a collective of the same name": (
        states(
            r0=("all-reduce world (x)", WORLD),
            r1=("all-reduce world (x)", WORLD),
            r2=("recv F0 from rank 3", (3,), 6),
            r3=("F0", (), 6),
        ),
        [3],
    ),
    "who works, before a collective that is complete": (
        states(
            r0=("all-reduce data (x)", (0, 1)),
            r1=("all-reduce data (x)", (0, 1)),
            r2=("recv F0 from rank 3", (3,)),
            r3=("F0", ()),
        ),
        [3],
    ),
    "all of a collective that is complete and does not end": (
        {rank: ProcessState(7, "all-reduce world (F3)", WORLD, 60.0) for rank in WORLD},
        [0, 1, 2, 3],
    ),
    "the one that most wait for": (
        states(
            r0=("recv F0 from rank 1", (1,)),
            r1=("F0", ()),
            r2=("W1", ()),
            r3=("recv F0 from rank 1", (1,)),
        ),
        [1],
    ),
    "nobody, in a circle": (
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
def test_everyone_waits_for(case):
    given, awaited = CASES[case]
    assert find_blocking_rank(given, []) == awaited
    assert (
        find_blocking_rank(
            {rank: ProcessState.from_json(state.to_json()) for rank, state in given.items()}, []
        )
        == awaited
    )


def test_those_that_do_not_answer_are_the_ones():
    given, _ = CASES["the end of a chain of receives"]
    assert find_blocking_rank(given, {5, 4}) == [4, 5]


def test_thousands_of_ranks_are_little():
    """All of 4096 wait for one, and each of them names all others: with them compared in pairs this would take minutes."""
    world = range(4096)
    given = {
        rank: ProcessState(7, "all-reduce world (x)", compact(tuple(world)), 60.0)
        for rank in world
        if rank != 77
    }
    given[77] = ProcessState(7, "loading data", (), 60.0)
    assert find_blocking_rank(given, []) == [77]
    assert all(len(str(state.to_json())) < 200 for state in given.values())
