"""Collectives along one mesh axis, with their backwards.

In the notation of Megatron-LM (arXiv 1909.08053, section 3) and of its sequence parallelism (arXiv
2205.05198, section 4.2.2):

    function                    forward          backward         input -> output, along the axis
    copy_to_tp            f     identity         all-reduce       replicated -> replicated
    reduce_from_tp        f*    all-reduce       identity         partial sums -> replicated
    gather_from_sp        g     all-gather       reduce-scatter   sequence shards -> replicated
    reduce_scatter_to_sp  g*    reduce-scatter   all-gather       partial sums -> sequence shards
    scatter_to_sp               own shard        all-gather       replicated -> sequence shards
    gather_to_replicated        all-gather       own shard        sequence shards -> replicated

Sharded weights use the output of `gather_from_sp`, so that each rank has a share of its gradient.
All ranks use the output of `gather_to_replicated` alike.

On an axis of size 1 each is the identity. The sequence is dim 0 of the tensors, so shards are
contiguous. Tensors on torch's meta device change their shape only, without communication.

Python objects can be gathered and broadcast as well. Each collective is recorded in the rank's
activity while it runs.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed.mesh import MeshAxis

T = TypeVar("T")


def all_reduce(x: Tensor, axis: MeshAxis, *, op: Any = None) -> Tensor:
    """Reduces x over the axis in place, by default to the sum, and returns it."""
    if axis.size > 1 and not x.is_meta:
        axis.activity.enter_collective("all-reduce", axis)
        dist.all_reduce(x, op=dist.ReduceOp.SUM if op is None else op, group=axis.group)
        axis.activity.leave_collective()
    return x


def mean_over(x: Tensor, axis: MeshAxis) -> Tensor:
    """Averages x over the axis in place and returns it."""
    return all_reduce(x, axis).div_(axis.size)


def all_gather(x: Tensor, axis: MeshAxis) -> Tensor:
    """Concatenates shards [s, ...] along dim 0 in rank order: [s * size, ...]."""
    if axis.size == 1:
        return x
    output = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    if not x.is_meta:
        axis.activity.enter_collective("all-gather", axis)
        dist.all_gather_into_tensor(output, x.contiguous(), group=axis.group)
        axis.activity.leave_collective()
    return output


def reduce_scatter(x: Tensor, axis: MeshAxis) -> Tensor:
    """Returns this rank's shard along dim 0 of the sum over the axis: [s, ...] -> [s / size,
    ...]."""
    if axis.size == 1:
        return x
    shard = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    if not x.is_meta:
        axis.activity.enter_collective("reduce-scatter", axis)
        dist.reduce_scatter_tensor(shard, x.contiguous(), group=axis.group)
        axis.activity.leave_collective()
    return shard


def own_shard(x: Tensor, axis: MeshAxis) -> Tensor:
    """Returns this rank's shard along dim 0."""
    return x.chunk(axis.size)[axis.rank].contiguous() if axis.size > 1 else x


def gather_objects(value: T, axis: MeshAxis) -> list[T]:
    """Returns the values of all ranks of the axis in rank order, on all of them."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with axis.activity.collective("all-gather", axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def broadcast_object(value: T, axis: MeshAxis) -> T:
    """Returns the value of the axis's first rank on all ranks; the values of others are ignored."""
    if axis.size == 1:
        return value
    values: list[Any] = [value]
    with axis.activity.collective("broadcast", axis):
        dist.broadcast_object_list(values, src=axis.ranks[0], group=axis.group)
    return values[0]


def barrier(axis: MeshAxis) -> None:
    """Blocks until all ranks of the axis have called it."""
    if axis.size > 1:
        with axis.activity.collective("barrier", axis):
            dist.barrier(axis.group)


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.axis), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        return all_reduce(x.clone() if axis.size > 1 else x.view_as(x), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFromSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ReduceScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _ScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return own_shard(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _GatherToReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_shard(grad, ctx.axis), None


def copy_to_tp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _CopyToTP.apply(x, axis) if axis.size > 1 else x


def reduce_from_tp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _ReduceFromTP.apply(x, axis) if axis.size > 1 else x


def gather_from_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _GatherFromSP.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_to_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _ReduceScatterToSP.apply(x, axis) if axis.size > 1 else x


def scatter_to_sp(x: Tensor, axis: MeshAxis) -> Tensor:
    return _ScatterToSP.apply(x, axis) if axis.size > 1 else x


def gather_to_replicated(x: Tensor, axis: MeshAxis) -> Tensor:
    return _GatherToReplicated.apply(x, axis) if axis.size > 1 else x


def enter_tensor_parallel(x: Tensor, axis: MeshAxis, *, sequence: bool) -> Tensor:
    """Passes x to column-parallel weights: the full sequence on every tensor rank."""
    return gather_from_sp(x, axis) if sequence else copy_to_tp(x, axis)


def leave_tensor_parallel(x: Tensor, axis: MeshAxis, *, sequence: bool) -> Tensor:
    """Sums the partial sums of row-parallel weights; returns the full sum or its sequence shard."""
    return reduce_scatter_to_sp(x, axis) if sequence else reduce_from_tp(x, axis)
