"""Plain causal attention in bf16 on CPUs: torch's forward, and a backward made of batched matrix products.

torch's backward on CPUs multiplies without the processor's units for bf16 and, in short sequences, multiplies what causality
forbids. This one takes the queries by blocks of rows and multiplies each with the keys up to the block's end:

    keys      0 ...... S
    block 0   [=]
    block 1   [====]              weights P = exp(scale q k' - L)         L the logarithm of each row's sum, of the forward
    block 2   [=======]           scores' gradient dS = P (dy v' - D)     D = y . dy of each row
    block 3   [==========]        (FlashAttention-2, arXiv 2307.08691, algorithm 2)

L and D ride along in the products, as two more columns of q and dy beside columns of ones in k and v: a product is rounded to bf16
once, after the subtraction, so that large scores lose nothing. Two columns, since one of bf16 would be off by 1 part in 512.
Query heads that share a key are rows of one product. No more is held at a time than a processor's cache takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatrain.parallel.layers import slow_half_precision

ROWS = 256
"""Rows of a product, of all query heads that share a key: fewer leave the matrix units waiting."""
LENGTHS = range(256, 1025)
"""Of the sequences that gain from it as measured; torch's backward catches up as less and less of what it computes is forbidden."""


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether q [B, h, S, d] and k [B, g, S, d] are better off here than with torch's backward."""
    length = q.shape[2]
    return (q.dtype == torch.bfloat16 and q.device.type == "cpu" and length in LENGTHS and length % _block(q, k) == 0
            and not slow_half_precision("cpu"))  # fmt: skip


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, h, S, d], k and v [B, g, S, d] -> [B, h, S, d]."""
    return _CausalAttention.apply(q, k, v, scale)


def _block(q: Tensor, k: Tensor) -> int:
    """Positions in a block."""
    return max(64, ROWS * k.shape[1] // q.shape[1])


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, log_sums = ctx.saved_tensors
        block, groups = _block(q, k), k.shape[1]
        exact = 2.0 ** round(math.log2(ctx.scale))  # scales q without rounding; the product is scaled by the rest of it
        rest = ctx.scale / exact
        queries = _in_blocks(q, log_sums / -rest, groups, exact, block)
        dout = _in_blocks(dy, -(dy * y).sum(-1, dtype=torch.float32), groups, 1.0, block)
        keys, values = _with_ones(k), _with_ones(v)
        dq = queries.new_empty((*queries.shape[:-1], q.shape[-1]))
        dk, dv = (k.new_zeros(k.flatten(0, 1).shape, dtype=torch.float32) for _ in range(2))
        some = 4 * torch.get_num_threads()
        for tensors in zip(*(x.split(some, dim=dim) for x, dim in ((queries, 1), (dout, 1), (keys, 0), (values, 0), (dq, 1), (dk, 0), (dv, 0))), strict=True):
            _backward(*tensors, block=block, rest=rest)
        dq = dq.mul_(ctx.scale).unflatten(1, (-1, groups)).unflatten(3, (-1, block)).permute(1, 2, 3, 0, 4, 5)
        return dq.reshape(q.shape), dk.mul_(rest).to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape), None


def _backward(queries: Tensor, dout: Tensor, keys: Tensor, values: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, *, block: int, rest: float) -> None:
    """Fill dq and add to dk and dv [n, S, d] of n groups of heads; queries and dout [S/block, n, rows, d+2], dq without the columns."""
    (_, count, rows, _), (_, length, dim) = queries.shape, dk.shape
    room = [keys.new_empty(count * rows * length) for _ in range(2)]
    for number in range(length // block):
        end = (number + 1) * block
        query, grad = queries[number], dout[number]
        weights, dscores = (x[: count * rows * end].view(count, rows, end) for x in room)
        torch.baddbmm(weights, query, keys[:, :end].transpose(1, 2), beta=0, alpha=rest, out=weights).exp_()
        weights.unflatten(1, (-1, block))[..., end - block :].tril_()
        torch.bmm(grad, values[:, :end].transpose(1, 2), out=dscores).mul_(weights)
        torch.bmm(dscores, keys[:, :end, :dim], out=dq[number])
        dv[:, :end] += torch.bmm(weights.transpose(1, 2), grad[..., :dim])
        dk[:, :end] += torch.bmm(dscores.transpose(1, 2), query[..., :dim])


def _in_blocks(x: Tensor, column: Tensor, groups: int, scale: float, block: int) -> Tensor:
    """Blocks of rows [S/block, B*g, h/g*block, d+2] of scale * x [B, h, S, d], the rows ending in the column [B, h, S]."""
    batch, heads, length, dim = x.shape
    blocks = x.new_empty((length // block, batch, groups, heads // groups, block, dim + 2))
    torch.mul(x.unflatten(1, (groups, -1)).unflatten(3, (-1, block)).permute(3, 0, 1, 2, 4, 5), scale, out=blocks[..., :dim])
    column = column.unflatten(1, (groups, -1)).unflatten(3, (-1, block)).permute(3, 0, 1, 2, 4)
    blocks[..., dim] = column
    blocks[..., dim + 1] = column - blocks[..., dim]
    return blocks.flatten(3, 4).flatten(1, 2)


def _with_ones(x: Tensor) -> Tensor:
    """x [B, g, S, d] and two columns of ones: [B*g, S, d+2]."""
    ones = x.new_ones((*x.shape[:-1], x.shape[-1] + 2))
    ones[..., :-2] = x
    return ones.flatten(0, 1)
