"""Collectives along one axis, each with its backward.

The letters of Megatron-LM (arXiv 1909.08053, section 3; sequence parallelism: arXiv 2205.05198, section 4.2.2):

    function          forward            backward           before -> after, along the axis
    copy          f   identity           all-reduce         same on all  -> same on all, used by split weights
    reduce        f*  all-reduce         identity           partial sums -> same on all
    gather        g   all-gather         reduce-scatter     sequence split -> whole
    scatter_sum   g*  reduce-scatter     all-gather         partial sums -> sequence split
    split             keep own part      all-gather         same on all  -> sequence split
    collect           all-gather         keep own part      sequence split -> same on all, used alike by all

An axis of size 1 makes each the identity. "Sequence" is dim 0 of the tensors, so parts are contiguous. Tensors without memory (torch's
meta device) are exchanged in shape alone, with nobody.

What is no tensor is gathered and broadcast too. Each collective is noted while it lasts, and no longer: a rank that works before it is
what the others are seen to wait for.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed.mesh import MeshAxis

T = TypeVar("T")


def all_reduce(x: Tensor, axis: MeshAxis, *, op: Any = None) -> Tensor:
    """Sum (or `op`) over the axis, in place; returns x."""
    if axis.size > 1 and not x.is_meta:
        axis.activity.enter_collective("all-reduce", axis)
        dist.all_reduce(x, op=dist.ReduceOp.SUM if op is None else op, group=axis.group)
        axis.activity.leave_collective()
    return x


def all_gather(x: Tensor, axis: MeshAxis) -> Tensor:
    """Parts [s, ...] joined along dim 0 in rank order: [s * size, ...]."""
    if axis.size == 1:
        return x
    whole = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    if not x.is_meta:
        axis.activity.enter_collective("all-gather", axis)
        dist.all_gather_into_tensor(whole, x.contiguous(), group=axis.group)
        axis.activity.leave_collective()
    return whole


def reduce_scatter(x: Tensor, axis: MeshAxis) -> Tensor:
    """This rank's part along dim 0 of the sum over the axis: [s, ...] -> [s / size, ...]."""
    if axis.size == 1:
        return x
    part = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    if not x.is_meta:
        axis.activity.enter_collective("reduce-scatter", axis)
        dist.reduce_scatter_tensor(part, x.contiguous(), group=axis.group)
        axis.activity.leave_collective()
    return part


def own_shard(x: Tensor, axis: MeshAxis) -> Tensor:
    """This rank's part along dim 0."""
    return x.chunk(axis.size)[axis.rank].contiguous() if axis.size > 1 else x


def gather_objects(value: T, axis: MeshAxis) -> list[T]:
    """What each rank of the axis has, in rank order, on all of them."""
    if axis.size == 1:
        return [value]
    everyone: list[Any] = [None] * axis.size
    with axis.activity.collective("all-gather", axis):
        dist.all_gather_object(everyone, value, group=axis.group)
    return everyone


def broadcast_object(value: T, axis: MeshAxis) -> T:
    """What the axis' first rank has, on all of them; those of the others do not matter."""
    if axis.size == 1:
        return value
    values: list[Any] = [value]
    with axis.activity.collective("broadcast", axis):
        dist.broadcast_object_list(values, src=axis.ranks[0], group=axis.group)
    return values[0]


def barrier(axis: MeshAxis) -> None:
    """No rank of the axis returns before all have come."""
    if axis.size > 1:
        with axis.activity.collective("barrier", axis):
            dist.barrier(axis.group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        return all_reduce(x.clone() if axis.size > 1 else x.view_as(x), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return own_shard(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_shard(grad, ctx.axis), None


def copy_to_tp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _Copy.apply(x, axis) if axis.size > 1 else x


def reduce_from_tp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _Reduce.apply(x, axis) if axis.size > 1 else x


def gather_from_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _Gather.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_to_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _ScatterSum.apply(x, axis) if axis.size > 1 else x


def scatter_to_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _Split.apply(x, axis) if axis.size > 1 else x


def gather_to_replicated(x: Tensor, axis: MeshAxis) -> Tensor:
    return _Collect.apply(x, axis) if axis.size > 1 else x


def enter_tensor_parallel(x: Tensor, axis: MeshAxis, *, sequence: bool) -> Tensor:
    """Into weights split by columns: whole sequence on every tensor rank afterwards."""
    return gather_from_sp(x, axis) if sequence else copy_to_tp(x, axis)


def leave_tensor_parallel(x: Tensor, axis: MeshAxis, *, sequence: bool) -> Tensor:
    """Out of weights split by rows: partial sums become the sum, whole or split along the sequence."""
    return reduce_scatter_to_sp(x, axis) if sequence else reduce_from_tp(x, axis)
