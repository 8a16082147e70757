"""RMSNorm (arXiv 1910.07467) with fp32 arithmetic: by blocks of rows, as one compiled kernel, or
torch's.

The blocked version saves its input and one number a token. It also serves a normalised dim that is
sharded over ranks: `reduce_mean` then averages each block's means over them.

Shapes: x [..., n], weight [n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.ops.compile import compiled
from megatrain.ops.row_blocks import row_blocks

ReduceMean = Callable[[Tensor], Tensor]
"""Averages a tensor over ranks, in place."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool = False,
    reduce_mean: ReduceMean | None = None,
    compile: bool = False,
) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight, in x's dtype.

    Args:
        plus_one: multiply by 1 + weight instead (Gemma).
        reduce_mean: given where ranks hold shares of the normalised dim. Ranks may hold copies of
            some heads: each copy counts alike, and the copies' shares of the gradient add up.
        compile: use one compiled kernel for the forward and one for the backward.
    """
    if compile and reduce_mean is None:
        return _CompiledRMSNorm.apply(x, weight, eps, plus_one)
    if x.is_cuda and reduce_mean is None and not plus_one:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _BlockedRMSNorm.apply(x, weight, eps, plus_one, reduce_mean)


class _BlockedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        plus_one: bool,
        reduce_mean: ReduceMean | None,
    ) -> Tensor:
        ctx.weight, ctx.plus_one, ctx.reduce_mean = weight, plus_one, reduce_mean
        rows, factor = x.reshape(-1, x.shape[-1]), _factor(weight, plus_one)
        y, scale = torch.empty_like(rows), rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
        for block, (wide,) in _blocks(rows, reduce_mean, buffers=1):
            wide.copy_(rows[block])
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale[block])
            mean = scale[block].square_().div_(x.shape[-1])
            _reduced(mean, reduce_mean).add_(eps).rsqrt_()
            y[block] = wide.mul_(scale[block]).mul_(factor)
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        rows, grads = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad))
        factor, dx = _factor(ctx.weight, ctx.plus_one), torch.empty_like(rows)
        dweight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for block, (normal, wide, product) in _blocks(rows, ctx.reduce_mean, buffers=3):
            torch.mul(normal.copy_(rows[block]), scale[block], out=normal)
            torch.mul(wide.copy_(grads[block]), normal, out=product)
            if dweight is not None:
                dweight += product.sum(0)
            inner = torch.mv(product, factor)[:, None].div_(x.shape[-1])
            inner = _reduced(inner, ctx.reduce_mean)
            dx[block] = wide.mul_(factor).addcmul_(normal, inner, value=-1).mul_(scale[block])
        weight_grad = None if dweight is None else dweight.to(ctx.weight.dtype)
        return dx.view(x.shape), weight_grad, None, None, None


def _blocks(
    rows: Tensor, reduce_mean: ReduceMean | None, *, buffers: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields blocks of rows with fp32 buffers of their size, which all blocks share.

    With `reduce_mean` there is one block, since each block costs a collective.
    """
    blocks = list(row_blocks(rows)) if reduce_mean is None else [slice(0, rows.shape[0])]
    shared = [
        torch.empty_like(rows[block], dtype=torch.float32)
        for block in blocks[:1]
        for _ in range(buffers)
    ]
    for block in blocks:
        yield block, [x[: rows[block].shape[0]] for x in shared]


def _factor(weight: Tensor, plus_one: bool) -> Tensor:
    return weight.float() + 1.0 if plus_one else weight.float()


def _reduced(means: Tensor, reduce_mean: ReduceMean | None) -> Tensor:
    return means if reduce_mean is None else reduce_mean(means)


class _CompiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        y, scale = compiled(_normalize)(x.detach(), weight.detach(), eps, plus_one)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.plus_one = weight, plus_one
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        dx, dweight = compiled(_normalize_backward)(
            x.detach(), scale, grad, ctx.weight.detach(), ctx.plus_one
        )
        return dx, dweight if ctx.needs_input_grad[1] else None, None, None


def _normalize(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + float(plus_one))).to(x.dtype), scale


def _normalize_backward(
    x: Tensor, scale: Tensor, grad: Tensor, weight: Tensor, plus_one: bool
) -> tuple[Tensor, Tensor]:
    normal, wide, factor = x.float() * scale, grad.float(), weight.float() + float(plus_one)
    product = wide * normal
    inner = (product * factor).mean(-1, keepdim=True)
    dx = (wide * factor - normal * inner) * scale
    return dx.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype)
