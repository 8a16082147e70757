"""Runs of flat shards, and copies between them, against indexing a tensor of numbered elements."""

from __future__ import annotations

import random

import numpy as np
import torch

from megatrain.distributed.reshard import (
    CopyPlan,
    Intervals,
    covers,
    intersect,
    intervals_of,
    make_flat_shard,
)
from megatrain.distributed.sharding import ShardSpec


def test_intervals_equal_the_drawing():
    piece = make_flat_shard(ShardSpec("x", (4, 6), 1, 3, 3), (4, 3), 1, 6)
    assert [tuple(run) for run in np.stack(intervals_of(piece), 1).tolist()] == [
        (4, 0, 2),
        (9, 2, 3),
        (15, 5, 1),
    ]


def local(s: ShardSpec, extent: int) -> torch.Tensor:
    """Returns the local parameter of a spec.

    Elements are numbered as in the complete tensor, in the parameter's orientation; padding is -1.
    """
    oriented = s.shape[::-1] if s.transposed else s.shape
    numbered = torch.arange(torch.Size(s.shape).numel()).view(oriented)
    part = s.shard(numbered.t() if s.transposed else numbered)
    if s.dim is not None:
        padding = list(part.shape)
        padding[s.dim] = extent - part.shape[s.dim]
        part = torch.cat([part, part.new_full(padding, -1)], s.dim)
    return (part.t() if s.transposed else part).contiguous()


def cut(parameter: torch.Tensor, s: ShardSpec, ranks: int, dice: random.Random):
    """Yields (flat shard, its elements) for each replica: a run of elements, as in ZeRO."""
    flat = parameter.flatten()
    ends = sorted(dice.randint(0, flat.numel()) for _ in range(ranks - 1))
    for first, last in zip([0, *ends], [*ends, flat.numel()], strict=True):
        yield make_flat_shard(s, tuple(parameter.shape), first, last - first), flat[first:last]


class Whole:
    """A random tensor, and its specs on the tensor ranks that hold parts, with local extents."""

    def __init__(self, dice: random.Random) -> None:
        self.kind = dice.choice(["whole", "vocabulary", "plain", "fused", "interleaved"])
        self.heads, self.width, self.other, self.dim = (
            dice.choice([2, 4, 8]),
            dice.choice([1, 2, 3]),
            dice.randint(1, 5),
            dice.choice([0, 1]),
        )
        self.transposed = self.kind != "vocabulary" and dice.random() < 0.5
        size = {
            "whole": 5,
            "vocabulary": dice.randint(3, 11),
            "plain": self.heads * self.width,
        }.get(self.kind, 3 * self.heads * self.width)
        if self.kind == "vocabulary":
            self.dim = 0
        self.shape = (size, self.other) if self.dim == 0 else (self.other, size)

    def parts(self, tensor: int) -> list[tuple[ShardSpec, int]]:
        width, own = self.width, self.heads // tensor
        if self.kind == "whole":
            return [(ShardSpec("x", self.shape, transposed=self.transposed), 0)]
        if self.kind == "vocabulary":
            rows = self.shape[0]
            extent = -(-rows // tensor)
            starts = [min(rank * extent, rows) for rank in range(tensor)]
            return [
                (ShardSpec("x", self.shape, 0, start, min(extent, rows - start)), extent)
                for start in starts
            ]
        if self.kind == "fused":  # three roles one after the other, as in GPT-2
            cuts = [
                ((role * self.heads + rank * own) * width, 0, 0)
                for role in range(3)
                for rank in range(tensor)
            ]
        elif self.kind == "interleaved":  # head by head, as in GPT-NeoX
            cuts = [
                ((rank * own * 3 + role) * width, width, 3 * width)
                for role in range(3)
                for rank in range(tensor)
            ]
        else:
            cuts = [(rank * own * width, 0, 0) for rank in range(tensor)]
        length = own * width
        return [
            (
                ShardSpec(
                    "x",
                    self.shape,
                    self.dim,
                    start,
                    length,
                    self.transposed,
                    block=block,
                    block_stride=block_stride,
                ),
                length,
            )
            for start, block, block_stride in cuts
        ]


def test_any_layout_is_rebuilt_from_any_other():
    """Random tensors and cuts, transposed or not.

    Splits are by rows and columns, with fused and interleaved roles, and with padding.
    """
    dice = random.Random(5)
    for _ in range(400):
        whole = Whole(dice)
        sizes = [tensor for tensor in (1, 2, 4, 8) if whole.heads % tensor == 0]
        source, target = whole.parts(dice.choice(sizes)), whole.parts(dice.choice(sizes))
        held = [
            piece
            for s, extent in source
            for piece in cut(local(s, extent), s, dice.choice([1, 2, 3]), dice)
        ]
        assert (
            sum(intervals_of(piece).total for piece, _ in held) == torch.Size(whole.shape).numel()
        ), "each element is in one piece"
        for s, extent in target:
            for piece, wanted in cut(local(s, extent), s, dice.choice([1, 2, 3]), dice):
                made = torch.full_like(wanted, -1)
                runs = intervals_of(piece)
                every = [intersect(intervals_of(theirs), runs) for theirs, _ in held]
                for copied, (_, elements) in zip(every, held, strict=True):
                    for a, b, n in zip(*copied, strict=True):
                        made[b : b + n] = elements[a : a + n]
                assert torch.equal(made, wanted)
                assert covers(runs, every)


def test_equal_shards_need_one_copy():
    for s in (
        ShardSpec("x", (50, 60), 1, 20, 20),
        ShardSpec("x", (60, 50), 0, 20, 20, transposed=True),
        ShardSpec("x", (64, 3), 0, 4, 16, block=4, block_stride=12),
    ):
        shape = s.shard_shape()[::-1] if s.transposed else s.shard_shape()
        runs = intervals_of(make_flat_shard(s, shape, 3, 40))
        assert [part.tolist() for part in intersect(runs, runs)] == [[0], [0], [40]]


def copies(*rows: tuple[int, int, int]) -> CopyPlan:
    return CopyPlan(*np.array(rows, np.int64).reshape(-1, 3).T)


def test_covers_detects_gaps_and_overlaps():
    target = Intervals(*np.array([[0], [0], [10]], np.int64))
    assert covers(target, [copies((0, 0, 4)), copies((9, 4, 6))])
    assert not covers(target, [copies((0, 0, 4))])
    assert not covers(target, [copies((0, 0, 4)), copies((0, 5, 5))])
    assert not covers(target, [copies((0, 0, 6)), copies((0, 4, 4))])
    assert not covers(target, [])
    assert covers(Intervals(*np.empty((3, 0), np.int64)), [])
