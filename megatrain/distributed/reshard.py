"""Positions of the elements of a rank's flat shard in the full tensor: index arithmetic on numbers
only.

A flat shard is a range of a rank's flattened parameter: what ZeRO leaves on one replica. Consider
the full tensor, flattened in the parameter's orientation. There the range is one interval if the
tensor is unsplit or split by its first dim. If it is split by a later dim, each row has an
interval. Take a [4, 6] matrix split by columns over two ranks. Elements 1 to 7 of the second rank
are

    full tensor          the rank's shard    intervals (full, local, length)
     0  1  2 | 3  4  5    0  1  2            ( 4, 1, 2)
     6  7  8 | 9 10 11    3  4  5            ( 9, 3, 3)
    12 13 14 |15 16 17    6  7  8            (15, 6, 1)
    18 19 20 |21 22 23    9 10 11

The intersection of two shards' intervals is what one can copy to the other, whatever their layouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatrain.distributed.sharding import ShardSpec

Numbers = np.ndarray
"""int64 [number of intervals]."""


@dataclass(frozen=True)
class FlatShard:
    """Elements [first, first + count) of a flattened local parameter.

    Attributes:
        shape, dim, start, length, block, block_stride, transposed: as in `ShardSpec`.
        extent: the local parameter's size along `dim`, including padding.
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
    """Intervals of elements.

    Attributes:
        full: the start of each in the full tensor, flattened in the parameter's orientation.
        local: the start of each, counted from the flat shard's first element.
    """

    full: Numbers
    local: Numbers
    length: Numbers

    @property
    def total(self) -> int:
        return int(self.length.sum())


class CopyPlan(NamedTuple):
    """Copies in the order of the target: starts in source and target, and numbers of elements."""

    source: Numbers
    target: Numbers
    length: Numbers


def make_flat_shard(
    s: ShardSpec, local_shape: tuple[int, ...], first: int, count: int
) -> FlatShard:
    """Returns the range [first, first + count) of a parameter of `local_shape`."""
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


def intervals_of(shard: FlatShard) -> Intervals:
    """Returns the intervals of a flat shard without padding; `full` and `local` are ascending."""
    shape, dim = shard.shape, shard.dim
    if dim is None:
        return _clip(
            Intervals(*(np.array([number], np.int64) for number in (0, 0, math.prod(shape)))), shard
        )
    if shard.transposed:
        shape, dim = shape[::-1], len(shape) - 1 - dim
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    block = shard.block or max(shard.length, 1)
    rows = np.arange(outer, dtype=np.int64)[:, None]
    blocks = np.arange(shard.length // block, dtype=np.int64)[None]
    full = (rows * shape[dim] + shard.start + blocks * shard.block_stride) * inner
    local = (rows * shard.extent + blocks * block) * inner
    return _clip(
        Intervals(full.ravel(), local.ravel(), np.full(full.size, block * inner, np.int64)), shard
    )


def _clip(intervals: Intervals, shard: FlatShard) -> Intervals:
    """Returns the part of the intervals in the flat shard, counted from its first element."""
    start = np.maximum(intervals.local, shard.first)
    stop = np.minimum(intervals.local + intervals.length, shard.first + shard.count)
    kept = stop > start
    start, stop = start[kept], stop[kept]
    return Intervals(
        intervals.full[kept] + start - intervals.local[kept], start - shard.first, stop - start
    )


def intersect(source: Intervals, target: Intervals) -> CopyPlan:
    """Returns the overlaps of two lists of intervals of one full tensor, with neighbours joined."""
    low = np.searchsorted(source.full + source.length, target.full, side="right")
    high = np.searchsorted(source.full, target.full + target.length, side="left")
    counts = np.maximum(high - low, 0)
    t = np.repeat(np.arange(counts.size), counts)
    s = np.arange(t.size) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    start = np.maximum(source.full[s], target.full[t])
    length = (
        np.minimum(source.full[s] + source.length[s], target.full[t] + target.length[t]) - start
    )
    return _join(
        CopyPlan(
            source.local[s] + start - source.full[s],
            target.local[t] + start - target.full[t],
            length,
        )
    )


def _join(copies: CopyPlan) -> CopyPlan:
    """Merges copies that continue the previous one in source and target."""
    source, target, length = copies
    if not length.size:
        return copies
    new = np.ones(length.size, bool)
    new[1:] = (source[1:] != source[:-1] + length[:-1]) | (target[1:] != target[:-1] + length[:-1])
    first = np.flatnonzero(new)
    return CopyPlan(source[first], target[first], np.add.reduceat(length, first))


def covers(target: Intervals, copies: list[CopyPlan]) -> bool:
    """Returns True if the copies write each element of the target exactly once."""
    starts = np.concatenate([np.empty(0, np.int64), *(copy.target for copy in copies)])
    lengths = np.concatenate([np.empty(0, np.int64), *(copy.length for copy in copies)])
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    return int(lengths.sum()) == target.total and bool(
        np.all(starts[1:] >= starts[:-1] + lengths[:-1])
    )
