"""Plain causal attention in bf16 on CPUs: torch's forward, and a backward made of batched matrix products.

torch's backward on CPUs multiplies without the processor's units for bf16 and, in short sequences, multiplies what causality
forbids. This one takes the queries by blocks of rows and multiplies the keys up to the block's end with each:

    keys      0 ...... S
    block 0   [=]
    block 1   [====]              weights P = exp(scale k q' - L)         L the logarithm of each query's sum, of the forward
    block 2   [=======]           scores' gradient dS = P (v dy' - D)     D = y . dy of each query
    block 3   [==========]        (FlashAttention-2, arXiv 2307.08691, algorithm 2, with a row for each key)

L and D ride along in the products, as two more columns of q and dy beside columns of ones in k and v: a product is rounded to bf16
once, after the subtraction, so that large scores lose nothing. Two columns, since one of bf16 would be off by 1 part in 512.
Query heads that share a key are columns of one product. With a row for each key, two of the three products that follow take the
weights as they lie: one that takes them turned is half as fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatrain.distributed.tensor_parallel import lacks_native_bf16
from megatrain.ops.compile import compiled

ROWS = 256
"""Queries of a product, of all heads that share a key: fewer leave the matrix units waiting."""
BLOCKS = 8
"""At most, of a sequence: each is compiled by itself."""
SCORES = 1 << 23
"""Held at a time, twice, in bf16: of as many keys and their queries."""
LENGTHS = range(256, 1025)
"""Of the sequences that gain from it as measured; torch's backward catches up as less and less of what it computes is forbidden."""


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether q [B, h, S, d] and k [B, g, S, d] are better off here than with torch's backward."""
    length = q.shape[2]
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and length in LENGTHS
        and length % _block(q, k) == 0
        and not lacks_native_bf16("cpu")
    )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, compile: bool = False
) -> Tensor:
    """q [B, h, S, d], k and v [B, g, S, d] -> [B, h, S, d]; `compile` what stands between the backward's products."""
    return _CausalAttention.apply(q, k, v, scale, compile)


def _block(q: Tensor, k: Tensor) -> int:
    """Positions in a block."""
    return max(64, ROWS * k.shape[1] // q.shape[1], q.shape[2] // BLOCKS)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, compile: bool) -> Tensor:
        y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.scale, ctx.compile = scale, compile
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, y, log_sums = (x.detach() for x in ctx.saved_tensors)
        block, shape = _block(q, k), k.shape
        exact = 2.0 ** round(
            math.log2(ctx.scale)
        )  # scales q without rounding; the scores are scaled by the rest of it
        rest = ctx.scale / exact
        arrange = compiled(_arrange) if ctx.compile else _arrange
        backward = compiled(_backward) if ctx.compile else _backward
        restore = compiled(_restore) if ctx.compile else _restore
        tensors = arrange(q, k, v, y, log_sums / -rest, dy, exact, block)
        rows = q.shape[1] // shape[1] * q.shape[2]
        some = max(4 * torch.get_num_threads(), SCORES // (rows * q.shape[2]))
        parts = [
            backward(queries, dout, keys, values, rest, block)
            for queries, dout, keys, values in zip(
                *(x.split(some, dim=-3) for x in tensors), strict=True
            )
        ]
        dq, dk, dv = (
            parts[0]
            if len(parts) == 1
            else (torch.cat(found, dim=-3) for found in zip(*parts, strict=True))
        )
        return restore(dq, ctx.scale, shape, block), dk.view(shape), dv.view(shape), None, None


def _arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sums: Tensor,
    dy: Tensor,
    scale: float,
    block: int,
) -> tuple[Tensor, ...]:
    """Queries and dout [S/block, B*g, h/g*block, d+2], keys and values [B*g, S, d+2]."""
    groups = k.shape[1]
    return (
        _in_blocks(q * scale, log_sums, groups, block),
        _in_blocks(dy, -(dy * y).sum(-1, dtype=torch.float32), groups, block),
        _with_ones(k),
        _with_ones(v),
    )


def _in_blocks(x: Tensor, column: Tensor, groups: int, block: int) -> Tensor:
    """Blocks of rows [S/block, B*g, h/g*block, d+2] of x [B, h, S, d], the rows ending in the column fp32 [B, h, S]."""
    x, column = (
        tensor.unflatten(1, (groups, -1)).unflatten(3, (-1, block)).permute(3, 0, 1, 2, 4, 5)
        for tensor in (x, column[..., None])
    )
    upper = (column.contiguous().view(torch.int32) & -0x10000).view(
        torch.float32
    )  # what bf16 holds of it, exactly
    return (
        torch.cat((x, upper.to(x.dtype), (column - upper).to(x.dtype)), dim=-1)
        .flatten(3, 4)
        .flatten(1, 2)
    )


def _with_ones(x: Tensor) -> Tensor:
    """x [B, g, S, d] and two columns of ones: [B*g, S, d+2]."""
    return torch.cat((x, x.new_ones((*x.shape[:-1], 2))), dim=-1).flatten(0, 1)


def _backward(
    queries: Tensor, dout: Tensor, keys: Tensor, values: Tensor, rest: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [S/block, n, rows, d], but for the scale, dk and dv [n, S, d] of n groups of heads, from what `_arrange` made."""
    dim = keys.shape[-1] - 2
    dq, dk, dv = [], [], []
    for number, (query, grad) in enumerate(zip(queries, dout, strict=True)):
        seen = slice(0, (number + 1) * block)
        key = keys[:, seen].contiguous()
        scores = torch.bmm(key, query.transpose(1, 2))
        weights, dscores = _weigh(
            scores, torch.bmm(values[:, seen], grad.transpose(1, 2)), rest, block
        )
        dq.append(torch.bmm(dscores.transpose(1, 2), key)[..., :dim])
        dk.append(torch.bmm(dscores, query)[..., :dim])
        dv.append(torch.bmm(weights, grad)[..., :dim])
    return torch.stack(dq), _sum(dk, rest), _sum(dv, 1.0)


def _weigh(scores: Tensor, dweights: Tensor, rest: float, block: int) -> tuple[Tensor, Tensor]:
    """Weights and scores' gradients [n, keys, rows] of the last block's queries, from scores and weights' gradients, whose memory it takes."""
    length = scores.shape[1]
    if torch.compiler.is_compiling():  # one pass, in fp32
        positions = torch.arange(scores.shape[2]) % block + (length - block)
        weights = (
            (scores.float() * rest)
            .exp()
            .masked_fill(torch.arange(length)[:, None] > positions, 0.0)
        )
        return weights.to(scores.dtype), (weights * dweights.float()).to(scores.dtype)
    weights = (scores if rest == 1.0 else scores.mul_(rest)).exp_()
    later = torch.ones((block, block), dtype=torch.bool).tril_(-1)
    weights[:, -block:].unflatten(2, (-1, block)).masked_fill_(later[:, None], 0.0)
    return weights, dweights.mul_(weights)


def _sum(parts: list[Tensor], scale: float) -> Tensor:
    """scale times the sum, in fp32, of parts [n, keys, d] of more and more keys."""
    block = parts[0].shape[1]
    sums = []
    for number in range(len(parts)):
        last, *others = (part[:, number * block : (number + 1) * block] for part in parts[number:])
        total = last.float()
        for other in others:
            total = total + other
        sums.append(total)
    return (torch.cat(sums, 1) * scale).to(parts[0].dtype)


def _restore(dq: Tensor, scale: float, shape: tuple[int, ...], block: int) -> Tensor:
    """scale * dq [B, h, S, d] of dq [S/block, B*g, h/g*block, d], where keys have the shape [B, g, S, d]."""
    heads = (
        dq.mul(scale).unflatten(1, shape[:2]).unflatten(3, (-1, block)).permute(1, 2, 3, 0, 4, 5)
    )
    return heads.flatten(3, 4).flatten(1, 2)
