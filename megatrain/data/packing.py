"""Which samples share a sequence: best-fit decreasing, in time linear in the samples.

    lengths 5 3 7 2 1, room for 8      longest first, each where the least room is left that takes it

        7 1
        5 3
        2

Within 11/9 of the fewest sequences plus one (Johnson 1973), and on real lengths, where short samples fill the gaps of
long ones, nearly full. A function of lengths, room and seed: nothing is stored, and every rank finds the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Int64 = np.ndarray[Any, np.dtype[np.int64]]


class Sequences(NamedTuple):
    """Sequence i holds samples order[starts[i] : starts[i + 1]]: int64[N] and int64[P + 1]."""

    order: Int64
    starts: Int64


def one_each(count: int) -> Sequences:
    """Every sample in a sequence of its own."""
    return Sequences(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: Int64, *, room: int, seed: int) -> Sequences:
    """Put samples of `lengths`, each at most `room`, together; which of equal length meet depends on the seed."""
    assert len(lengths) == 0 or int(lengths.max()) <= room, (int(lengths.max()), room)
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    place = _place(lengths[longest_first], room)
    by_place = np.argsort(place, kind="stable")
    counts = np.bincount(place) if len(place) else np.zeros(0, dtype=np.int64)
    return Sequences(
        longest_first[by_place], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    )


def _place(lengths: Int64, room: int) -> Int64:
    """The sequence of each sample, in the order given."""
    place = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [
        [] for _ in range(room + 1)
    ]  # sequences by the room they have left
    left = 0  # bit r is set when some sequence has room r left: finding the least that suffices is one shift
    opened = 0
    for index, length in enumerate(lengths.tolist()):
        fitting = left >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[space].pop()
            if not with_room[space]:
                left ^= 1 << space
        else:
            space, sequence = room, opened
            opened += 1
        place[index] = sequence
        with_room[space - length].append(sequence)
        left |= 1 << (space - length)
    return place
