"""Layers whose weights are sharded over tensor ranks.

Columns of a weight are its output features, rows its input features (Megatron-LM, arXiv 1909.08053,
section 3):

    [S, B, H] -- enter --> column-parallel -> [S, B, F/t]
              -> row-parallel -> partial sums -- leave --> [S, B, H]

A linear does not know its ranks: `enter_tensor_parallel` and `leave_tensor_parallel` surround a
pair. So linears with the same input (query, key, value; gate, up) share one collective.

Shapes: S sequence, B micro-batch, H hidden, F features, V vocabulary, t tensor ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.ops.dtypes import to_matmul_dtype
from megatrain.ops.nf4 import NF4Weight, dequantize
from megatrain.ops.row_blocks import row_blocks


class _Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in], with its weight gradient added to the fp32 `main_grad`.

    Adding in place saves a temporary of the weight's size for each microbatch, and accumulates in
    fp32 whatever the weight's dtype. For a frozen weight the input is not saved. A quantized weight
    is dequantized for the duration of a product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        y = F.linear(
            to_matmul_dtype(x),
            to_matmul_dtype(dequantize(weight, x.dtype)),
            None if bias is None else to_matmul_dtype(bias),
        )
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        wide = to_matmul_dtype(grad.reshape(-1, grad.shape[-1]))
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = wide @ to_matmul_dtype(dequantize(weight, grad.dtype))
            dx = dx.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(DeferredWeightGrad(weight, x, grad))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = wide.sum(0).to(grad.dtype)
        return dx, dw, db


class DeferredWeightGrad(NamedTuple):
    """The inputs of a weight's gradient: the linear's input and its output's gradient."""

    weight: Tensor
    x: Tensor
    grad: Tensor


_deferred: list[DeferredWeightGrad] | None = None


@contextlib.contextmanager
def defer_weight_grads(into: list[DeferredWeightGrad]) -> Iterator[None]:
    """Makes backwards append the inputs of linear weight gradients to a list instead of computing
    them.

    This holds for the process, not for a thread: autograd runs a GPU's backward in its own thread.
    """
    global _deferred
    _deferred = into
    try:
        yield
    finally:
        _deferred = None


@torch.no_grad()
def compute_deferred_weight_grads(deferred: list[DeferredWeightGrad]) -> None:
    """Adds each weight's gradient to its `main_grad`, and frees its inputs at once."""
    while deferred:
        weight_gradient(*deferred.pop())


def _weight_gradient(inputs: DeferredWeightGrad) -> Tensor | None:
    if _deferred is not None and hasattr(inputs.weight, "main_grad"):
        _deferred.append(inputs)
        return None
    return weight_gradient(*inputs)


def weight_gradient(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor | None:
    """Adds grad' x [out, in] to `weight.main_grad` and returns None; without that buffer, returns
    it."""
    x = to_matmul_dtype(x.reshape(-1, x.shape[-1]))
    grad = to_matmul_dtype(grad.reshape(-1, grad.shape[-1]))
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return (grad.t() @ x).to(weight.dtype)
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(grad.t(), x)
    else:
        gradient = grad.t() @ x
        for rows in row_blocks(gradient):
            main_grad[rows].add_(gradient[rows])
    return None


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Returns x weight' + bias; see `_Linear` for its gradients."""
    return _Linear.apply(x, weight, bias)


class ColumnParallelLinear(nn.Module):
    """x [..., in] -> [..., out]; the shard specs of its parameters declare how they are split."""

    weight: nn.Parameter | NF4Weight

    def __init__(self, weight: nn.Parameter | NF4Weight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, microbatch: Any = None) -> Tensor:
        """Returns the linear's output; only replacements such as `LoraLinear` read the
        microbatch."""
        return linear(x, self.weight, self.bias)


class RowParallelLinear(ColumnParallelLinear):
    """A linear split by input features; tensor ranks sum its output before they add the bias."""

    def __init__(
        self,
        weight: nn.Parameter | NF4Weight,
        bias: nn.Parameter | None,
        *,
        axis: MeshAxis,
        sequence: bool,
    ) -> None:
        super().__init__(weight, bias)
        self.axis, self.sequence = axis, sequence

    def forward(self, x: Tensor, microbatch: Any = None) -> Tensor:
        y = linear(x, self.weight)
        y = collectives.leave_tensor_parallel(y, self.axis, sequence=self.sequence)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding table split by rows: tokens int64 [B, S] -> [S, B, H].

    Under sequence parallelism it returns this rank's shard [S/t, B, H].
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        start: int,
        axis: MeshAxis,
        sequence: bool,
        padding_token: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.start, self.axis, self.sequence = start, axis, sequence
        is_local = padding_token is not None and start <= padding_token < start + weight.shape[0]
        self.padding_row = padding_token - start if padding_token is not None and is_local else None

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens.t() - self.start
        if self.axis.size == 1:
            return F.embedding(local, self.weight, self.padding_row)
        remote = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(remote, 0), self.weight, self.padding_row)
        return collectives.leave_tensor_parallel(
            rows.masked_fill(remote[..., None], 0), self.axis, sequence=self.sequence
        )
