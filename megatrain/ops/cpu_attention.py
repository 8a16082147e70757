"""Plain causal attention in bf16 on CPUs: torch's forward, and a backward of batched matrix
products.

torch's backward on CPUs multiplies without the processor's bf16 units. In short sequences it also
multiplies what causality masks. This backward takes blocks of queries and multiplies each block
with the keys up to the block's end:

    keys      0 ...... S
    block 0   [=]                 L: log-sum-exp of each query's scores
    block 1   [====]              D = y . dy of each query
    block 2   [=======]           weights P = exp(scale k q' - L)
    block 3   [==========]        scores' gradient dS = P (v dy' - D)

This is algorithm 2 of FlashAttention-2 (arXiv 2307.08691) with a row for each key.

L and D are two extra columns of q and dy beside columns of ones in k and v. So a product is rounded
to bf16 once, after the subtraction, and large scores lose nothing. One bf16 column would be off by
1 part in 512; therefore two hold each number. Query heads that share a key are columns of one
product. With a row for each key, two of the three later products read the weights as they lie in
memory; a product with transposed weights is half as fast.

Shapes: B micro-batch, h query heads, g key-value heads, S sequence, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatrain.ops.compile import compiled
from megatrain.ops.dtypes import lacks_native_bf16

ROWS = 256
"""Minimum queries of a product, over all heads that share a key; fewer underuse the matrix
units."""
BLOCKS = 8
"""Maximum blocks of a sequence; each is compiled separately."""
SCORES = 1 << 23
"""Maximum scores held at once, in bf16 and twice; more are split over groups of heads."""
LENGTHS = range(256, 1025)
"""Sequence lengths measured to be faster; in longer ones torch's backward wastes a smaller
share."""


def supports(q: Tensor, k: Tensor) -> bool:
    """Returns True if this backward is faster than torch's for q [B, h, S, d] and k [B, g, S,
    d]."""
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
    """Returns attention [B, h, S, d] of q [B, h, S, d], k and v [B, g, S, d].

    `compile` compiles the elementwise work between the backward's products.
    """
    return _CausalAttention.apply(q, k, v, scale, compile)


def _block(q: Tensor, k: Tensor) -> int:
    """Returns the number of positions in a block."""
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
        # A power of two scales q without rounding; the scores are scaled by the rest.
        exact = 2.0 ** round(math.log2(ctx.scale))
        rest = ctx.scale / exact
        arrange = compiled(_arrange) if ctx.compile else _arrange
        backward = compiled(_backward) if ctx.compile else _backward
        restore = compiled(_restore) if ctx.compile else _restore
        tensors = arrange(q, k, v, y, log_sums / -rest, dy, exact, block)
        rows = q.shape[1] // shape[1] * q.shape[2]
        groups = max(4 * torch.get_num_threads(), SCORES // (rows * q.shape[2]))
        parts = [
            backward(queries, dout, keys, values, rest, block)
            for queries, dout, keys, values in zip(
                *(x.split(groups, dim=-3) for x in tensors), strict=True
            )
        ]
        dq, dk, dv = (
            parts[0]
            if len(parts) == 1
            else (torch.cat(tensors, dim=-3) for tensors in zip(*parts, strict=True))
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
    """Returns queries and dout [S/block, B*g, h/g*block, d+2], keys and values [B*g, S, d+2]."""
    groups = k.shape[1]
    return (
        _in_blocks(q * scale, log_sums, groups, block),
        _in_blocks(dy, -(dy * y).sum(-1, dtype=torch.float32), groups, block),
        _with_ones(k),
        _with_ones(v),
    )


def _in_blocks(x: Tensor, column: Tensor, groups: int, block: int) -> Tensor:
    """Returns x [B, h, S, d] in blocks [S/block, B*g, h/g*block, d+2].

    Each row ends in its number of `column`, fp32 [B, h, S], as two bf16 numbers.
    """
    x, column = (
        tensor.unflatten(1, (groups, -1)).unflatten(3, (-1, block)).permute(3, 0, 1, 2, 4, 5)
        for tensor in (x, column[..., None])
    )
    # The part that bf16 holds exactly.
    upper = (column.contiguous().view(torch.int32) & -0x10000).view(torch.float32)
    return (
        torch.cat((x, upper.to(x.dtype), (column - upper).to(x.dtype)), dim=-1)
        .flatten(3, 4)
        .flatten(1, 2)
    )


def _with_ones(x: Tensor) -> Tensor:
    """Returns x [B, g, S, d] with two columns of ones: [B*g, S, d+2]."""
    return torch.cat((x, x.new_ones((*x.shape[:-1], 2))), dim=-1).flatten(0, 1)


def _backward(
    queries: Tensor, dout: Tensor, keys: Tensor, values: Tensor, rest: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns unscaled dq [S/block, n, rows, d], dk and dv [n, S, d] of n groups of heads.

    The arguments are those that `_arrange` returns, for these groups.
    """
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
    """Returns weights and scores' gradients [n, keys, rows] of the last block's queries.

    They overwrite the memory of `scores` and of `dweights`, the weights' gradients.
    """
    length = scores.shape[1]
    if torch.compiler.is_compiling():  # a single pass, in fp32
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
    """Returns scale times the fp32 sum of parts [n, keys, d], each with one block of keys more."""
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
    """Returns scale * dq as [B, h, S, d], from dq [S/block, B*g, h/g*block, d].

    `shape` is the keys' shape [B, g, S, d].
    """
    heads = (
        dq.mul(scale).unflatten(1, shape[:2]).unflatten(3, (-1, block)).permute(1, 2, 3, 0, 4, 5)
    )
    return heads.flatten(3, 4).flatten(1, 2)
