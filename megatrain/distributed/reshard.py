"""Where the elements of a rank's piece of a parameter are in the whole tensor: numbers only, no tensors and no ranks.

A piece is a run of neighbours of a rank's flattened parameter: what ZeRO leaves on one replica. In the whole tensor, flattened
in the parameter's own orientation, these neighbours are one run when the tensor is whole or split by its first dim, and one run
a row when it is split further in. Of a [4, 6] matrix split by columns over two ranks, the second rank's elements 1 to 7 are

    the whole            the rank's part     runs (whole, local, length)
     0  1  2 | 3  4  5    0  1  2            ( 4, 1, 2)
     6  7  8 | 9 10 11    3  4  5            ( 9, 3, 3)
    12 13 14 |15 16 17    6  7  8            (15, 6, 1)
    18 19 20 |21 22 23    9 10 11

What one piece can give to another is where their runs meet, whatever the layouts that cut them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatrain.distributed.sharding import ShardSpec

Numbers = np.ndarray
"""int64 [runs]."""


@dataclass(frozen=True)
class FlatShard:
    """Elements [first, first + count) of a flattened local parameter, and what the parameter is a part of.

    Attributes:
        shape, dim, start, length, run, stride, transposed: as in `Sharding`, in the whole tensor's orientation.
        extent: the local parameter's size along `dim`, padding included.
    """

    shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int
    block: int
    block_stride: int
    transposed: bool
    extent: int
    first: int
    count: int


class Intervals(NamedTuple):
    """Runs of elements: where each starts in the whole tensor (in the parameter's orientation) and from the piece's first on."""

    whole: Numbers
    local: Numbers
    length: Numbers

    @property
    def total(self) -> int:
        return int(self.length.sum())


class CopyPlan(NamedTuple):
    """What to copy: where from in the source, where to in the target, how many elements; by target."""

    source: Numbers
    target: Numbers
    length: Numbers


def make_flat_shard(
    s: ShardSpec, local_shape: tuple[int, ...], first: int, count: int
) -> FlatShard:
    """The piece [first, first + count) of a parameter of `local_shape`."""
    oriented = local_shape[::-1] if s.transposed else local_shape
    extent = oriented[s.dim] if s.dim is not None else 0
    return FlatShard(
        s.shape,
        s.dim,
        s.start,
        s.length,
        s.block,
        s.block_stride,
        s.transposed,
        extent,
        first,
        count,
    )


def intervals_of(piece: FlatShard) -> Intervals:
    """The piece as runs in both orders, padding left out; both rise."""
    shape, dim = piece.shape, piece.dim
    if dim is None:
        return _clip(
            Intervals(*(np.array([number], np.int64) for number in (0, 0, math.prod(shape)))), piece
        )
    if piece.transposed:
        shape, dim = shape[::-1], len(shape) - 1 - dim
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    block = piece.block or max(piece.length, 1)
    rows = np.arange(outer, dtype=np.int64)[:, None]
    regions = np.arange(piece.length // block, dtype=np.int64)[None]
    whole = (rows * shape[dim] + piece.start + regions * piece.block_stride) * inner
    local = (rows * piece.extent + regions * block) * inner
    return _clip(
        Intervals(whole.ravel(), local.ravel(), np.full(whole.size, block * inner, np.int64)), piece
    )


def _clip(runs: Intervals, piece: FlatShard) -> Intervals:
    """What of the runs is in the piece, counted from its first element."""
    start = np.maximum(runs.local, piece.first)
    stop = np.minimum(runs.local + runs.length, piece.first + piece.count)
    kept = stop > start
    start, stop = start[kept], stop[kept]
    return Intervals(runs.whole[kept] + start - runs.local[kept], start - piece.first, stop - start)


def intersect(source: Intervals, target: Intervals) -> CopyPlan:
    """Where two lists of runs of one whole tensor overlap, neighbours joined."""
    low = np.searchsorted(source.whole + source.length, target.whole, side="right")
    high = np.searchsorted(source.whole, target.whole + target.length, side="left")
    counts = np.maximum(high - low, 0)
    t = np.repeat(np.arange(counts.size), counts)
    s = np.arange(t.size) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    start = np.maximum(source.whole[s], target.whole[t])
    length = (
        np.minimum(source.whole[s] + source.length[s], target.whole[t] + target.length[t]) - start
    )
    return _join(
        CopyPlan(
            source.local[s] + start - source.whole[s],
            target.local[t] + start - target.whole[t],
            length,
        )
    )


def _join(copies: CopyPlan) -> CopyPlan:
    """Copies that go on where the one before ended, on both sides, become one."""
    source, target, length = copies
    if not length.size:
        return copies
    new = np.ones(length.size, bool)
    new[1:] = (source[1:] != source[:-1] + length[:-1]) | (target[1:] != target[:-1] + length[:-1])
    first = np.flatnonzero(new)
    return CopyPlan(source[first], target[first], np.add.reduceat(length, first))


def covers(target: Intervals, pieces: list[CopyPlan]) -> bool:
    """Whether the copies together write each element of the target, and none of them twice."""
    starts = np.concatenate([np.empty(0, np.int64), *(copies.target for copies in pieces)])
    lengths = np.concatenate([np.empty(0, np.int64), *(copies.length for copies in pieces)])
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    return int(lengths.sum()) == target.total and bool(
        np.all(starts[1:] >= starts[:-1] + lengths[:-1])
    )
