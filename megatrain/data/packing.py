"""Packing of samples into sequences: best-fit decreasing, in time linear in the samples.

    lengths 5 3 7 2 1, capacity 8      longest first, each into the fullest sequence that takes it

        7 1
        5 3
        2

Uses at most 11/9 of the fewest sequences plus one (Johnson 1973). On real lengths, where short
samples fill the gaps of long ones, sequences are nearly full. The result depends on lengths,
capacity and seed alone, so every rank computes the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Int64 = np.ndarray[Any, np.dtype[np.int64]]


class PackedSequences(NamedTuple):
    """Sequence i contains samples order[starts[i] : starts[i + 1]]: int64[N] and int64[P + 1]."""

    order: Int64
    starts: Int64


def one_per_sequence(count: int) -> PackedSequences:
    """Returns `count` samples, each in its own sequence."""
    return PackedSequences(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: Int64, *, capacity: int, seed: int) -> PackedSequences:
    """Packs samples of `lengths`, each at most `capacity`, into sequences.

    The seed decides which samples of equal length share a sequence.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, (int(lengths.max()), capacity)
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sequences = _best_fit(lengths[longest_first], capacity)
    by_sequence = np.argsort(sequences, kind="stable")
    counts = np.bincount(sequences) if len(sequences) else np.zeros(0, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return PackedSequences(longest_first[by_sequence], starts)


def _best_fit(lengths: Int64, capacity: int) -> Int64:
    """Returns the sequence of each sample; samples are taken in the given order."""
    sequences = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set if a sequence has space r left: one shift finds the least space that suffices.
    spaces = 0
    num_sequences = 0
    for index, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, sequence = capacity, num_sequences
            num_sequences += 1
        sequences[index] = sequence
        by_space[space - length].append(sequence)
        spaces |= 1 << (space - length)
    return sequences
